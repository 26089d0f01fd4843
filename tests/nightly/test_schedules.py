"""The schedules of a night: manifests of the form that Kubernetes and KubeRay take.

``SHOAL_KUBERAY_CRDS`` may name a folder with KubeRay's CRD files (``ray.io_rayjobs.yaml`` and so
on); then the Ray jobs are also checked against the schemas in them, unknown fields refused.
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.nightly.config import NightConfig
from pipelines.runtime.command import parse

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "kubernetes"
CRDS = os.environ.get("SHOAL_KUBERAY_CRDS")


def documents(name: str) -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all((FOLDER / name).read_text())
    return {document["kind"]: document for document in found}


CRON = documents("nightly-cronjob.yaml")
RAY_JOB = yaml.safe_load(CRON["ConfigMap"]["data"]["rayjob.yaml"])
RAY_CRON_JOB = documents("nightly-raycronjob.yaml")["RayCronJob"]
JOBS = {"cron job": RAY_JOB["spec"], "ray cron job": RAY_CRON_JOB["spec"]["jobTemplate"]}


def is_schedule(text: str) -> bool:
    """Five fields of numbers, lists, ranges and steps within what each may be."""
    fields = text.split()
    most = (59, 23, 31, 12, 7)
    return len(fields) == 5 and all(
        re.fullmatch(r"(\*|\d+(-\d+)?)(/\d+)?(,\d+(-\d+)?)*", field)
        and all(int(number) <= limit for number in re.findall(r"(?<!/)\b\d+", field))
        for field, limit in zip(fields, most, strict=True)
    )


def test_the_cron_job_never_runs_twice_at_a_time():
    spec = CRON["CronJob"]["spec"]
    assert CRON["CronJob"]["apiVersion"] == "batch/v1"
    assert is_schedule(spec["schedule"])
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    assert spec["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_the_pod_may_create_and_watch_ray_jobs_and_nothing_else():
    pod = CRON["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == CRON["ServiceAccount"]["metadata"]["name"]
    assert CRON["RoleBinding"]["roleRef"]["name"] == CRON["Role"]["metadata"]["name"]
    assert CRON["RoleBinding"]["subjects"][0]["name"] == pod["serviceAccountName"]
    assert CRON["Role"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    mounted = pod["volumes"][0]["configMap"]["name"]
    assert mounted == CRON["ConfigMap"]["metadata"]["name"]
    command = pod["containers"][0]["command"][-1]
    assert command.removeprefix("/nightly/") in CRON["ConfigMap"]["data"]


def test_the_ray_cron_job_has_the_fields_of_its_kind():
    assert RAY_CRON_JOB["apiVersion"] == "ray.io/v1"
    assert set(RAY_CRON_JOB["spec"]) == {"schedule", "suspend", "jobTemplate"}
    assert is_schedule(RAY_CRON_JOB["spec"]["schedule"])


@pytest.mark.parametrize("text", ["0 3 * * *", "*/5 0-6 1,15 * 7"])
def test_schedules_are_told_from_other_text(text):
    assert is_schedule(text)
    assert not is_schedule(text + " *")
    assert not is_schedule("0 25 * * *")


def test_both_schedules_run_the_same_ray_job():
    assert RAY_JOB["apiVersion"] == "ray.io/v1"
    assert RAY_JOB["kind"] == "RayJob"
    assert JOBS["cron job"] == JOBS["ray cron job"]


@pytest.mark.parametrize("job", JOBS)
def test_the_night_is_started_with_options_that_exist(job):
    python, script, *options = shlex.split(JOBS[job]["entrypoint"])
    assert python == "python"
    assert (ROOT / script.removeprefix("/home/ray/shoal/")).exists()
    assert parse(NightConfig, options).store == "s3://BUCKET/store"
    assert JOBS[job]["shutdownAfterJobFinishes"] is True
    assert JOBS[job]["backoffLimit"] == 0
    assert {"headGroupSpec", "workerGroupSpecs", "rayVersion"} <= set(JOBS[job]["rayClusterSpec"])


@pytest.mark.skipif(not CRDS, reason="SHOAL_KUBERAY_CRDS names no folder of CRD files")
def test_the_ray_jobs_follow_the_schemas_of_kuberay():
    for document, plural in ((RAY_JOB, "rayjobs"), (RAY_CRON_JOB, "raycronjobs")):
        crd = yaml.safe_load((Path(CRDS or "") / f"ray.io_{plural}.yaml").read_text())
        version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
        check(document["spec"], version["schema"]["openAPIV3Schema"]["properties"]["spec"], plural)


def check(value: Any, schema: dict[str, Any], place: str) -> None:
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool}
    kinds |= {"integer": int, "number": (int, float)}
    if schema.get("x-kubernetes-int-or-string"):
        assert isinstance(value, int | str), place
        return
    assert isinstance(value, kinds[schema["type"]]), f"{place}: {value!r}"
    if isinstance(value, dict):
        missing = set(schema.get("required", ())) - set(value)
        assert not missing, f"{place} lacks {missing}"
        for name, inner in value.items():
            found = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            assert found, f"{place} has no field {name}"
            check(inner, found, f"{place}.{name}")
    if isinstance(value, list):
        for inner in value:
            check(inner, schema["items"], place)
