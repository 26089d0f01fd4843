"""Ray's provider of pretended nodes, with a folder of its own for each node.

As it comes, all nodes share the head's folder, and each new one unpacks the working directory there
anew, under the feet of the processes that have it open. A folder names its Ray cluster, as ``ray
start`` leaves it: without that, a submitted job joins any Ray that it finds on the machine.

Loaded by name in the head's autoscaler.
"""

import functools
import os
import tempfile
from unittest import mock

import ray._private.parameter
import ray._private.utils
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class ApartNodes(FakeMultiNodeProvider):
    # Once a node, where the public method is once a request for several.
    def _create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        parameter = ray._private.parameter
        with self.lock:  # reentrant; requests come from several threads
            folder = tempfile.mkdtemp(dir=os.environ["SIMULATED_NODES"])
            ray._private.utils.write_ray_address(self._gcs_address, folder)
            apart = functools.partial(parameter.RayParams, temp_dir=folder)
            with mock.patch.object(parameter, "RayParams", apart):
                super()._create_node_with_resources_and_labels(
                    node_config, tags, count, resources, labels
                )
