"""Where on a Ray cluster work may run, and how large the Ray cluster can become.

Nodes may carry the label ``shoal-role``: ``head``, ``cpu`` or ``accelerator``, as
``ray_cluster.yaml`` and the Kubernetes manifests set it. Reading and clustering then keep off the
accelerator nodes, which are dear and may be taken away. Without labels work runs where Ray puts it.

Ray tells a job what is there now, not what its autoscaler could add. An operator says that in
``SHOAL_MAX_RESOURCES``, such as ``CPU=64,GPU=8``, in the environment of the head.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.errors import InputError

ROLE_LABEL = "shoal-role"
MAX_RESOURCES = "SHOAL_MAX_RESOURCES"
OFF_ACCELERATORS = {ROLE_LABEL: "!accelerator"}
OFF_HEAD = {ROLE_LABEL: "!head"}
_KINDS = ("CPU", "GPU")


@dataclass(frozen=True)
class RayNodes:
    """The nodes of a Ray cluster that are alive, and what it can grow to.

    ``growth`` is empty where the Ray cluster stays as it is. ``driver`` is the id of this
    process's node.
    """

    nodes: Sequence[Mapping[str, Any]]
    growth: Mapping[str, float]
    driver: str = ""

    @property
    def count(self) -> int:
        """Number of nodes; more than one where more may come."""
        return len(self.nodes) + bool(self.growth)

    @property
    def cpu_selector(self) -> dict[str, str] | None:
        """Labels that keep work off accelerators, where another node is labelled as made for it."""
        return OFF_ACCELERATORS if any(role_of(node) == "cpu" for node in self.nodes) else None

    def resources(self) -> dict[str, float]:
        """CPUs and GPUs for work on this Ray cluster, with those it can still add."""
        found = {kind: self._there(kind) for kind in _KINDS}
        return {kind: max(amount, self.growth.get(kind, 0.0)) for kind, amount in found.items()}

    def _there(self, kind: str) -> float:
        total = sum(node["Resources"].get(kind, 0.0) for node in self.nodes)
        on_cpu_node = any(
            node["NodeID"] == self.driver and role_of(node) == "cpu" for node in self.nodes
        )
        # A driver that was submitted to a worker node holds a CPU of it (--entrypoint-num-cpus).
        return total - 1 if kind == "CPU" and on_cpu_node else total


def find_nodes() -> RayNodes:
    """The nodes of the Ray cluster that this process is connected to."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    growth = parse_resources(os.environ.get(MAX_RESOURCES, ""))
    return RayNodes(alive, growth, find_driver())


def find_driver() -> str:
    """The id of this process's node."""
    return ray.get_runtime_context().get_node_id()


def role_of(node: Mapping[str, Any]) -> str | None:
    """A node's role, None where it has no such label."""
    return (node.get("Labels") or {}).get(ROLE_LABEL)


def parse_resources(text: str) -> dict[str, float]:
    """``CPU=64,GPU=8`` as a mapping; :class:`InputError` for anything else but an empty text."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part.strip()]
        found = {name.strip(): float(amount) for name, amount in pairs}
    except ValueError as error:
        raise InputError(f"{MAX_RESOURCES} is {text!r}; it must be like CPU=64,GPU=8") from error
    unknown = sorted(set(found) - set(_KINDS))
    if unknown or any(amount < 0 for amount in found.values()):
        raise InputError(f"{MAX_RESOURCES} is {text!r}; it may name CPU and GPU, with amounts")
    return found
