"""What tests share: a tiny model, one local Ray for the session, an S3 server on loopback."""

import os
import tempfile
import threading
from pathlib import Path

import hypothesis
import pytest
from ports import free_port

hypothesis.settings.register_profile("whatever the machine does", deadline=None)
hypothesis.settings.load_profile("whatever the machine does")

S3_PORT = free_port()
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "2000",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "120",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_DEDUP_LOGS": "1",
    "HF_HUB_OFFLINE": "1",
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3_PORT}",
    "AWS_ACCESS_KEY_ID": "an-access-key-id",
    "AWS_SECRET_ACCESS_KEY": "a-secret-that-is-found-nowhere",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "PYTHONPATH": f"{Path(__file__).parent.parent}:{Path(__file__).parent}",
}
# Before Ray or torch is imported anywhere: workers inherit what the session started with.
os.environ.update(ENVIRONMENT)
if "RAY_TMPDIR" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
Path(os.environ["RAY_TMPDIR"], "ray").mkdir(parents=True, exist_ok=True)

from pipelines.encoder import remembered  # noqa: E402


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("bfloat16"):
        from tiny_models import imitates_bfloat16

        if imitates_bfloat16():
            pytest.skip("this CPU only imitates bfloat16")
    if item.get_closest_marker("int8"):
        from tiny_models import multiplies_int8

        if not multiplies_int8():
            pytest.skip("this CPU multiplies in int8 inexactly")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """A random model of two layers with a tokenizer, as a local folder."""
    from tiny_models import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=2)


@pytest.fixture(scope="session", autouse=True)
def nothing_remembered(tmp_path_factory):
    """What tests find out of encoders, some with parts replaced, is kept for this session only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "FOLDER", str(tmp_path_factory.mktemp("encoders")))
        yield


@pytest.fixture(scope="session")
def local_ray():
    """Ray on this machine with four logical CPUs, shared by the session."""
    import ray

    if not ray.is_initialized():
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def s3_server():
    """A real S3 API server on loopback, where ``AWS_ENDPOINT_URL`` points to; its client.

    Gone after a module's tests: others run a server of their own at that address.
    """
    import boto3
    from moto.server import DomainDispatcherApplication, ThreadedMotoServer

    answer, writing = DomainDispatcherApplication.__call__, threading.Lock()

    def one_write_at_a_time(self, environ, start_response):
        # moto looks whether an object is there and then writes it: of two who may only create it,
        # at the same moment both would
        if environ["REQUEST_METHOD"] != "PUT":
            return answer(self, environ, start_response)
        with writing:
            return answer(self, environ, start_response)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DomainDispatcherApplication, "__call__", one_write_at_a_time)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=S3_PORT, verbose=False)
        server.start()
        yield boto3.client("s3")
        server.stop()
