"""The guide's commands and every job by ``ray job submit``, on the Ray cluster of the cluster file.

One simulated Ray cluster for all of them: a head, and nodes that its autoscaler starts and ends.
The tests build on each other in the order in which they stand.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pytest
from ray.job_submission import JobSubmissionClient
from simulated_cluster import RAY, SimulatedCluster
from tiny_models import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE, re.S)
PRESENT = {path.name for path in (ROOT / "jobs").glob("*.py")}
BUCKET = "s3://shoal-guide"
METRICS = ("ray_shoal_embedded_texts_total", "ray_shoal_units_done_total", "ray_shoal_texts_left")
ON_WORKER = ("--working-dir", ".", "--entrypoint-num-cpus", "1")
# What cannot run here, and what is tested in its place.
ELSEWHERE = {
    "git clone": "the commands run in a clean copy of the checkout",
    "make install": "the tests run in what it installs",
    "source": "the environment is active",
    "ray up": "test_ray_cluster_file.py; the Ray cluster here is made of the same file",
    "ray down": "as ray up",
    "ray dashboard": "as ray up",
}
OTHER_JOBS = {
    "generate_pairs.py": "--corpus {corpus} --output {out}/pairs --crop-words 6 12",
    "evaluate_mteb.py": "--corpus {corpus} {encoder} --output {out}/mteb",
    "select_encoder.py": "--corpus {corpus} {encoder} --output {out}/best",
    "deduplicate_corpus.py": "--embeddings {bucket}/runs/reviews --output {out}/deduplicated",
    "assign_clusters.py": "--embeddings {bucket}/runs/reviews --output {out}/assigned "
    "--clusters {bucket}/runs/reviews-clusters",
    "inspect_attention.py": "--model {model} --output {out}/attention --text {text}",
}
# Stands in for the AWS command line, which is no part of Shoal.
AWS = """#!{python}
import sys
import pyarrow.fs as pafs
_, s3, cp, source, target = sys.argv
assert (s3, cp) == ("s3", "cp"), sys.argv
filesystem, path = pafs.FileSystem.from_uri(target)
with open(source, "rb") as read, filesystem.open_output_stream(path) as written:
    written.write(read.read())
"""


@dataclass
class Workplace:
    """A newcomer's checkout, a Ray cluster and a bucket."""

    cluster: SimulatedCluster
    checkout: Path
    model: Path
    large_corpus: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **self.cluster.environment,
            "PYTHONPATH": str(self.checkout),  # as its editable install would have it
            "MODEL": str(self.model),
            "BUCKET": BUCKET,
            "RAY_API_SERVER_ADDRESS": self.cluster.address,
        }

    def submit(self, entrypoint, options=ON_WORKER):
        return self.cluster.submit(entrypoint, cwd=self.checkout, options=options)


@pytest.fixture(scope="module")
def place(tmp_path_factory, s3_server, local_ray):
    """``local_ray`` is another Ray on this machine, which no submitted job may join."""
    folder = tmp_path_factory.mktemp("place")
    s3_server.create_bucket(Bucket=BUCKET.removeprefix("s3://"))
    tools = folder / "bin"
    tools.mkdir()
    (tools / "aws").write_text(AWS.format(python=sys.executable))
    (tools / "aws").chmod(0o755)
    removed = ("PYTHONPATH", "RAY_ADDRESS")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in removed},
        "PATH": os.pathsep.join([str(tools), str(RAY.parent), os.environ["PATH"]]),
        "SHOAL_HOME": str(folder / "home"),
        "SHOAL_LOG_FORMAT": "json",
        "RAY_metrics_report_interval_ms": "1000",
    }
    checkout = copy_checkout(folder / "shoal")
    model = tiny_model(folder / "tiny", num_hidden_layers=2)
    large = folder / "large.jsonl"
    lines = (json.dumps({"id": n, "text": f"{n} " + "the old song " * 60}) for n in range(4000))
    large.write_text("\n".join(lines))
    cluster = SimulatedCluster(folder, environment)
    yield Workplace(cluster, checkout, model, large)
    cluster.close()


def copy_checkout(folder: Path) -> Path:
    """The working directory as a clone has it."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "outputs")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copy(ROOT / ".rayignore", folder)
    return folder


def commands_of(block: str) -> list[str]:
    """A block's commands; here-documents and continued lines are whole."""
    found, lines = [], iter(block.rstrip().splitlines())
    for line in lines:
        command = line
        end = re.search(r"<<'(\w+)'", line)
        while command.endswith("\\") or (end and line != end[1]):
            line = next(lines)
            command += "\n" + line
        found.append(command)
    return found


def jobs_in(command: str) -> set[str]:
    return set(re.findall(r"jobs/(\w+\.py)", command))


def test_only_the_head_is_there_at_first(place):
    assert list(place.cluster.nodes().values()) == ["head"]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_guides_commands_do_what_it_says(place, number):
    for command in commands_of(BLOCKS[number]):
        missing = jobs_in(command) - PRESENT
        assert missing <= {"nightly_reindex.py", "manage_store.py", "search_store.py"}
        exported = re.match(r"export (\w+)=", command)
        if exported:
            assert exported[1] in place.environment, f"the test knows no {exported[1]}"
            continue
        if missing or command.startswith(tuple(ELSEWHERE)):
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=place.checkout,
            env=place.environment, capture_output=True, text=True, timeout=580, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_guide_left_what_it_says(place):
    for folder in ("runs/reviews", "runs/reviews-clusters"):
        assert (
            json.loads((place.checkout / folder / "run.json").read_text())["status"] == "complete"
        )
        assert read_record(f"{BUCKET}/{folder}")["status"] == "complete"
    table = read_rows(f"{BUCKET}/runs/reviews-tuned/embeddings")
    assert sorted(table["id"].to_pylist()) == list(range(240))


def test_accelerators_encode_and_train_cpu_nodes_read_and_cluster_the_head_does_nothing(place):
    roles = {row["node_id"]: row["labels"]["shoal-role"] for row in place.cluster.state("nodes")}
    found: dict[str, set[str]] = {}
    for kind, name in (("tasks", "name"), ("actors", "class_name")):
        for row in place.cluster.state(kind):
            if row["node_id"] and any(row["required_resources"].get(r) for r in ("CPU", "GPU")):
                found.setdefault(row[name], set()).add(roles[row["node_id"]])
    places = {what: where for what, where in found.items() if "JobSupervisor" not in what}
    assert "head" not in set().union(*found.values()), found
    encoders = [where for what, where in places.items() if "ChunkActor" in what]
    assert encoders, places
    assert all(where == {"accelerator"} for where in encoders), places
    others = {
        what: where
        for what, where in places.items()
        if any(part in what for part in ("_call_unit", "_UnitActor"))
    }
    assert others, places
    assert all(where == {"cpu"} for where in others.values()), places


def test_the_runs_lines_are_json_with_run_and_shard(place):
    record = read_record(f"{BUCKET}/runs/reviews")
    submission = next(
        row
        for row in submissions(place)
        if f"--output {BUCKET}/runs/reviews " in row["entrypoint"] and row["status"] == "SUCCEEDED"
    )
    logs = place.cluster.driver_log(submission["submission_id"])
    lines = [json.loads(line) for line in logs.splitlines() if line.startswith("{")]
    ours = [line for line in lines if line.get("run_id") == record["run_id"]]
    assert {line["job"] for line in ours} == {"embed_corpus"}
    assert {"keys", "read", "embed", "parts"} <= {line.get("stage") for line in ours}
    assert all(line["shard"] and line["node_id"] for line in ours if "stage" in line)


def test_run_json_says_what_made_a_vector(place):
    clusters = read_record(f"{BUCKET}/runs/reviews-clusters")
    made_from = clusters["inputs"]["embeddings"]
    embedded = read_record(f"{BUCKET}/runs/reviews")
    assert made_from["run_id"] == embedded["run_id"]
    assert made_from["encoder_fingerprint"] == embedded["metrics"]["encoder_fingerprint"]
    assert re.fullmatch("[0-9a-f]{64}", embedded["source_sha256"])
    assert embedded["metrics"]["corpus_digest"]
    schema = dataset(f"{BUCKET}/runs/reviews/embeddings").schema
    fingerprint = schema.metadata[b"shoal.encoder_fingerprint"].decode()
    assert fingerprint == made_from["encoder_fingerprint"]


def test_no_credentials_in_records_outputs_and_logs(place, s3_server):
    """Those of the environment, which every job here used against the bucket."""
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert len(secret) > 12, "a secret that is a common word finds itself everywhere"
    bucket = BUCKET.removeprefix("s3://")
    keys = [item["Key"] for item in s3_server.list_objects_v2(Bucket=bucket)["Contents"]]
    small = [key for key in keys if key.endswith((".json", ".md", ".html", ".txt"))]
    assert any(key.endswith("run.json") for key in small)
    for key in small:
        content = s3_server.get_object(Bucket=bucket, Key=key)["Body"].read()
        assert secret.encode() not in content, key
    logs = place.cluster.logs()
    assert any("job-driver" in path.name for path in logs)
    for path in logs:
        assert secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("job", sorted(OTHER_JOBS.keys() & PRESENT))
def test_every_other_job_runs_by_submission(place, job):
    arguments = OTHER_JOBS[job].format(
        bucket=BUCKET,
        corpus=f"{BUCKET}/corpus",
        encoder=f"--label-column thing --model {place.model}",
        model=place.model,
        out=f"{BUCKET}/others",
        text="a_warm_coat",
    )
    done = place.submit(["python", f"jobs/{job}", *arguments.split()])
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_job_is_left_out():
    assert jobs_in(GUIDE) | OTHER_JOBS.keys() >= PRESENT - {"__init__.py"}


def test_a_users_mistake_fails_the_submitted_job_with_its_line(place):
    entrypoint = ["python", "jobs/embed_corpus.py", "--corpus", f"{BUCKET}/nowhere"]
    options = (*ON_WORKER, "--submission-id", "mistaken")
    done = place.submit([*entrypoint, "--output", f"{BUCKET}/out"], options)
    assert done.returncode == 1  # Ray's for whatever is not 0; it keeps the job's own
    assert JobSubmissionClient(place.cluster.address).get_job_info("mistaken").driver_exit_code == 2
    assert re.search(r"error: .*nowhere", done.stdout + done.stderr)
    assert "Traceback" not in done.stdout


def test_a_lost_gpu_node_and_a_stop_cost_work_in_flight_only(place, tmp_path):
    output = tmp_path / "out"
    entrypoint = ["python", "jobs/embed_corpus.py", "--corpus", str(place.large_corpus)]
    entrypoint += ["--model", str(place.model), "--output", str(output), "--chunk-tokens", "8192"]
    started = place.submit(entrypoint, [*ON_WORKER, "--no-wait", "--submission-id", "interrupted"])
    assert started.returncode == 0, started.stderr
    cluster = place.cluster
    cluster.wait_for(lambda: chunks(output) >= 2, 240, "chunk")
    cluster.wait_for(
        lambda: all(name in cluster.metrics() for name in METRICS), 60, "metrics of ours"
    )
    cluster.kill_node("accelerator")
    seen = chunks(output)
    cluster.wait_for(lambda: chunks(output) >= seen + 6, 240, "chunk after the node was lost")
    assert cluster.job_status("interrupted") == "RUNNING"

    stopped = cluster.run("job", "stop", "interrupted", cwd=place.checkout)
    assert cluster.job_status("interrupted") == "STOPPED", stopped.stdout + stopped.stderr
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] == "stopped; the same command goes on from here"
    kept = chunks(output)
    assert kept >= 8

    again = place.submit(entrypoint)
    assert again.returncode == 0, again.stdout + again.stderr
    table = read_rows(str(output / "embeddings"))
    assert sorted(table["id"].to_pylist()) == list(range(4000))
    log = cluster.driver_log(re.search(r"Job '(raysubmit_\w+)'", again.stdout)[1])
    assert int(re.search(r"embed: (\d+) chunks are done", log)[1]) >= kept


def test_nodes_go_when_nothing_needs_them(place):
    place.cluster.wait_for(
        lambda: set(place.cluster.nodes().values()) == {"head"}, 90, "idle nodes taken away"
    )


def chunks(output: Path) -> int:
    return len(list((output / "_work" / "vectors").glob("[!.]*.parquet")))


def submissions(place) -> list[dict]:
    with urllib.request.urlopen(f"{place.cluster.address}/api/jobs/", timeout=20) as answer:
        return json.loads(answer.read())


def dataset(uri: str) -> pads.Dataset:
    filesystem, path = pafs.FileSystem.from_uri(uri)
    return pads.dataset(path, filesystem=filesystem)


def read_rows(uri: str):
    return dataset(uri).to_table()


def read_record(folder: str) -> dict:
    filesystem, path = pafs.FileSystem.from_uri(f"{folder}/run.json")
    with filesystem.open_input_stream(path) as stream:
        return json.loads(stream.read())
