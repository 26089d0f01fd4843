import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import create_exclusively, join, list_files, read_bytes, write_bytes
from pipelines.store.lease import (
    LeaseHeldError,
    LeaseLostError,
    ProcessIdentity,
    newest_lease,
    take_lease,
)


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path, monkeypatch):
    if request.param == "local":
        return str(tmp_path / "store")
    client = request.getfixturevalue("s3_server")
    bucket = f"shoal-lease-{abs(hash(request.node.name)) % 10**8}"
    client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/store"


def edit(folder, **changes):
    """Rewrite the newest lease, as its holder or time would."""
    state = newest_lease(folder)
    content = {**json.loads(read_bytes(path_of(folder, state.number))), **changes}
    write_bytes(path_of(folder, state.number), json.dumps(content).encode())


def path_of(folder, number):
    return join(folder, "lease", f"{number:08d}.json")


def test_a_second_taker_is_told_who_holds_it(folder):
    with (
        take_lease(folder, "nightly_reindex", 60) as lease,
        pytest.raises(LeaseHeldError, match=r"being written by 'nightly_reindex' on .* .process"),
    ):
        take_lease(folder, "other", 60)
    assert LeaseHeldError.exit_code == 75
    assert lease.state.released


def test_it_can_be_taken_after_it_was_given_back(folder):
    with take_lease(folder, "first", 60):
        pass
    with take_lease(folder, "second", 60) as lease:
        lease.check()
        assert lease.state.number == 2
    assert list_files(join(folder, "lease")) == ["00000002.json"]


def test_it_is_given_back_after_an_error(folder):
    with pytest.raises(ZeroDivisionError), take_lease(folder, "first", 60):
        1 / 0  # noqa: B018
    with take_lease(folder, "second", 60):
        pass


def test_a_holder_of_another_machine_that_stopped_renewing_loses_it(folder):
    lease = take_lease(folder, "stopped", 60)
    edit(folder, machine="another", renewed_at=time.time() - 20)
    with pytest.raises(LeaseHeldError, match="if it is dead, its lease ends by itself in"):
        take_lease(folder, "next", 60)
    edit(folder, machine="another", renewed_at=time.time() - 61)
    with (
        take_lease(folder, "next", 60),
        pytest.raises(LeaseLostError, match="taken over by 'next'"),
    ):
        lease.check()
    lease.release()
    assert newest_lease(folder).job == "next"


def test_a_holder_that_lives_renews_it(tmp_path):
    with take_lease(str(tmp_path), "lives", 4) as lease:
        taken = newest_lease(str(tmp_path)).renewed_at
        while newest_lease(str(tmp_path)).renewed_at == taken:
            time.sleep(0.05)
        lease.check()
        with pytest.raises(LeaseHeldError):
            take_lease(str(tmp_path), "other", 4)


def test_a_holder_that_cannot_renew_in_time_stops(tmp_path, monkeypatch):
    lease = take_lease(str(tmp_path), "paused", 60)
    lease._renewed -= 61
    with pytest.raises(LeaseLostError, match="could not be renewed for 60 s"):
        lease.check()


@pytest.mark.parametrize("buried", [True, False], ids=["gone", "zombie"])
def test_a_killed_holder_of_this_machine_loses_it_at_once(tmp_path, buried):
    program = (
        "import sys, time; from pipelines.store.lease import take_lease; "
        "lease = take_lease(sys.argv[1], 'killed', 3600); print('taken', flush=True); "
        "time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(LeaseHeldError, match=f"process {process.pid}"):
        take_lease(str(tmp_path), "next", 60)
    process.send_signal(signal.SIGKILL)
    if buried:
        process.wait()
    else:
        while ProcessIdentity.of(process.pid).started:
            time.sleep(0.01)
    with take_lease(str(tmp_path), "next", 60) as lease:
        lease.check()
    process.wait()
    process.stdout.close()


def test_of_many_takers_one_gets_it(folder):
    def take(number: int) -> str | None:
        try:
            lease = take_lease(folder, f"job-{number}", 60)
        except LeaseHeldError:
            return None
        held.append(lease)
        return lease.state.job

    held: list = []
    with ThreadPoolExecutor(8) as pool:
        winners = [job for job in pool.map(take, range(8)) if job]
    assert winners == [newest_lease(folder).job]
    held[0].release()


def test_a_late_creator_of_an_old_number_does_not_hold_it(folder):
    """Its number was taken, ended and removed between its look and its creation."""
    with take_lease(folder, "first", 60):
        pass
    with take_lease(folder, "second", 60):
        stale = replace(newest_lease(folder), number=1, job="late")
        write_bytes(path_of(folder, 1), json.dumps(stale.__dict__).encode())
        assert newest_lease(folder).job == "second"
    with take_lease(folder, "third", 60):
        assert list_files(join(folder, "lease")) == ["00000003.json"]


def test_a_file_is_created_once_and_whole(folder):
    assert create_exclusively(join(folder, "a"), b"first")
    assert not create_exclusively(join(folder, "a"), b"second")
    assert read_bytes(join(folder, "a")) == b"first"
    assert list_files(folder) == ["a"]


def test_a_creation_whose_answer_was_lost_counts(s3_server, monkeypatch):
    """The client asks again after its first request arrived, and finds its own file."""
    s3_server.create_bucket(Bucket="shoal-lost-answer")
    path = "s3://shoal-lost-answer/a"
    write_bytes(path, b"mine")
    assert create_exclusively(path, b"mine")
    assert not create_exclusively(path, b"another's")


def test_a_missing_bucket_is_the_users_error(s3_server):
    with pytest.raises(InputError, match="Check that the bucket exists"):
        create_exclusively("s3://shoal-no-such-bucket/a", b"x")


def test_other_remote_stores_are_refused():
    with pytest.raises(InputError, match="a store is a local folder or an s3:// address"):
        create_exclusively("gs://bucket/a", b"x")


def test_a_process_is_told_from_a_later_one_of_the_same_number():
    mine = ProcessIdentity.of(os.getpid())
    assert not mine.is_dead()
    assert replace(mine, started="1").is_dead()
    assert not replace(mine, machine="another machine", started="1").is_dead()
    assert not replace(mine, started="").is_dead()
