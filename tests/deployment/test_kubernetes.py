"""The manifests under docs/kubernetes: their form, and that they agree with lock and each other.

``SHOAL_KUBERAY_CRDS`` may name a folder with KubeRay's CRD files (``ray.io_rayclusters.yaml`` and
so on); then every manifest is also checked against the schemas in them, unknown fields refused.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.runtime.machines import parse_resources

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "kubernetes"
LOCKED_RAY = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
DOCUMENTS = [
    (path.name, document)
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
CRDS = os.environ.get("SHOAL_KUBERAY_CRDS")


def ray_clusters() -> list[tuple[str, dict[str, Any]]]:
    """The Ray cluster specification of every document that has one, however deep."""

    def search(value: Any) -> list[dict[str, Any]]:
        if isinstance(value, dict):
            if "headGroupSpec" in value:
                return [value]
            return [found for item in value.values() for found in search(item)]
        return []

    return [(name, found) for name, document in DOCUMENTS for found in search(document)]


def pods(value: Any) -> list[dict[str, Any]]:
    """Every pod specification."""
    if isinstance(value, dict):
        if "containers" in value:
            return [value]
        return [found for item in value.values() for found in pods(item)]
    if isinstance(value, list):
        return [found for item in value for found in pods(item)]
    return []


def test_there_is_a_ray_cluster_and_a_job():
    kinds = {document["kind"] for _, document in DOCUMENTS}
    assert {"RayCluster", "RayJob", "ServiceAccount", "NetworkPolicy"} <= kinds


@pytest.mark.parametrize(("name", "cluster"), ray_clusters())
def test_ray_is_the_locked_one(name, cluster):
    assert cluster["rayVersion"] == LOCKED_RAY


def test_the_image_is_built_from_the_lock():
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{LOCKED_RAY}-py311" in dockerfile
    assert "--constraint /home/ray/shoal/constraints.txt" in dockerfile
    for line in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile, re.M):
        for source in line.split():
            assert (ROOT / source).exists(), source


@pytest.mark.parametrize(("name", "cluster"), ray_clusters())
def test_roles_growth_and_scale_from_zero(name, cluster):
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["labels"] == {"shoal-role": "head"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    roles = {group["labels"]["shoal-role"]: group for group in workers}
    assert set(roles) == {"cpu", "accelerator"}
    assert all(group["minReplicas"] == 0 for group in workers)
    total = {"CPU": 0.0, "GPU": 0.0}
    for role, group in roles.items():
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (role == "accelerator")
        total["CPU"] += group["maxReplicas"] * float(limits["cpu"])
        total["GPU"] += group["maxReplicas"] * float(limits.get("nvidia.com/gpu", 0))
    for pod in pods(cluster):
        environment = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
        assert parse_resources(environment["SHOAL_MAX_RESOURCES"]) == total
        assert environment["SHOAL_HOME"] == "/home/ray/shoal-home"
        assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "30"


@pytest.mark.parametrize(("name", "document"), DOCUMENTS)
def test_pods_have_no_rights_and_bounds(name, document):
    for pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"requests", "limits"} <= container["resources"].keys()
            assert ":latest" not in container["image"]
            assert ":" in container["image"]


def test_a_jobs_entrypoint_is_a_job_of_ours():
    for name, document in DOCUMENTS:
        if document["kind"] == "RayJob":
            job = re.search(r"jobs/(\w+\.py)", document["spec"]["entrypoint"])[1]
            assert (ROOT / "jobs" / job).is_file(), name
            assert document["spec"]["shutdownAfterJobFinishes"] is True
            assert document["spec"]["entrypointNumCpus"] >= 1


@pytest.mark.skipif(not CRDS, reason="SHOAL_KUBERAY_CRDS names no folder of CRDs")
@pytest.mark.parametrize(("name", "document"), DOCUMENTS)
def test_the_operators_schema_takes_every_manifest(name, document):
    import jsonschema

    path = Path(CRDS or "", f"ray.io_{document['kind'].lower()}s.yaml")
    if not document["apiVersion"].startswith("ray.io/"):
        pytest.skip("not a resource of the operator's")
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    wanted = document["apiVersion"].partition("/")[2]
    schema = next(v for v in versions if v["name"] == wanted)["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    refuse_unknown(schema["properties"]["spec"])
    jsonschema.validate(document, schema)


def refuse_unknown(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        free = schema.get("x-kubernetes-preserve-unknown-fields")
        if isinstance(schema.get("properties"), dict) and not free:
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            refuse_unknown(value)
    elif isinstance(schema, list):
        for value in schema:
            refuse_unknown(value)
