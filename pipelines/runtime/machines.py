"""Where on a Ray cluster work may run, and how large the Ray cluster can become.

Nodes may carry the label ``shoal-role``: ``head``, ``cpu`` or ``accelerator``, as
``ray_cluster.yaml`` and the Kubernetes manifests set it. Reading and clustering then keep off the
accelerator nodes, which are dear and may be taken away. Without labels work runs where Ray puts it.

Ray tells a job what is there now, not what its autoscaler could add. An operator says that in
``SHOAL_MAX_RESOURCES``, such as ``CPU=64,GPU=8``, in the environment of the head.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from pipelines.runtime.errors import InputError

log = logging.getLogger(__name__)

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
        present = {kind: self._there(kind) for kind in _KINDS}
        return {kind: max(amount, self.growth.get(kind, 0.0)) for kind, amount in present.items()}

    @property
    def cpus(self) -> int:
        """CPUs for work that keeps off accelerators, with those that this Ray cluster can add."""
        apart = 0.0
        if self.cpu_selector:
            accelerators = [node for node in self.nodes if role_of(node) == "accelerator"]
            apart = sum(node["Resources"].get("CPU", 0.0) for node in accelerators)
        return max(1, int(self.resources()["CPU"] - apart))

    def _there(self, kind: str) -> float:
        total = sum(node["Resources"].get(kind, 0.0) for node in self.nodes)
        on_cpu_node = any(
            node["NodeID"] == self.driver and role_of(node) == "cpu" for node in self.nodes
        )
        # A driver that was submitted to a worker node holds a CPU of it (--entrypoint-num-cpus).
        return total - 1 if kind == "CPU" and on_cpu_node else total


def usable_cpus(root: str = "/") -> int:
    """CPUs that this process may use: those it may run on, within its control group's quota.

    ``os.cpu_count()`` counts those of the machine, of which a container may have a share. ``root``
    is where ``proc`` and ``sys`` are.
    """
    cpus = float(len(os.sched_getaffinity(0)))
    for quota, period in _cpu_quotas(Path(root)):
        cpus = min(cpus, quota / period)
    return max(1, math.ceil(cpus))


def logical_cpus() -> int:
    """CPUs that a Ray on this machine is told of: four at least.

    Ray Data reserves one for every stage, and with two a pipeline of reader, actor pool and writer
    can wait for itself for ever.
    """
    return max(4, usable_cpus())


def has_accelerator() -> bool:
    """Whether this machine has a device that only Ray may hand out."""
    return any(next(Path("/dev").glob(name), None) for name in ("nvidia[0-9]*", "kfd", "accel*"))


def usable_memory_bytes(root: str = "/") -> int:
    """Memory that this process may use: the machine's, within its control group's limit.

    ``root`` is where ``proc`` and ``sys`` are.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group in _control_groups(Path(root), "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            memory = min([memory, *map(int, _read_numbers(group / name))])
    return memory


def require_memory(path: str, size_bytes: int, remedy: str) -> None:
    """Raise :class:`InputError`, with the ``remedy``, for what must be in memory and has no room.

    ``size_bytes`` of the file ``path`` are to be held at once; they may take half of the memory.
    """
    memory = usable_memory_bytes()
    if size_bytes > memory / 2:
        raise InputError(
            f"{path}: {size_bytes / 2**30:,.1f} GiB of it must be in memory at once, and this "
            f"process may use {memory / 2**30:,.1f} GiB: {remedy}"
        )


def _cpu_quotas(root: Path) -> Iterator[tuple[float, float]]:
    """Microseconds of CPU in a period of so many, for each control group that sets a limit."""
    for group in _control_groups(root, "cpu"):
        numbers = _read_numbers(group / "cpu.max") or [
            number
            for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            for number in _read_numbers(group / name)
        ]
        if len(numbers) == 2 and numbers[0] > 0 and numbers[1] > 0:
            yield numbers[0], numbers[1]


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups: what limits one limits all that are in it."""
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in ["0::/", f"0:{controller}:/", *lines]:
        _, controllers, own = line.split(":", 2)
        mount = groups / controller if controller in controllers.split(",") else groups
        folder = mount / own.lstrip("/")
        # a group has no more than those that it is in; a container may see its own as the root
        for group in [folder, *folder.parents]:
            if not group.is_relative_to(mount):
                break
            yield group


def _read_numbers(path: Path) -> list[float]:
    """The numbers of a small file; none where it is not there or says that there is no limit."""
    try:
        return [float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


_SOCKET_BYTES = 107
"""The longest path of a socket that Linux takes."""
_LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"


def keep_sockets_short() -> None:
    """Give a Ray that is started here a short folder where ``TMPDIR`` is too long for its sockets.

    Raises :class:`InputError` where there is none to be had.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    longest = _SOCKET_BYTES - len(_LONGEST_SOCKET)
    if len(os.fsencode(folder)) <= longest:
        return
    try:
        os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="shoal-", dir="/tmp")
    except OSError as error:
        raise InputError(
            f"temporary files are to lie in {folder}, which is too long for Ray's sockets, and "
            f"nothing can be made in /tmp: set RAY_TMPDIR to a folder of at most {longest} bytes"
        ) from error
    log.info("Ray's own files are in %s: %s is too long", os.environ["RAY_TMPDIR"], folder)


_start: Callable[[], None] | None = None


def start_when_needed(start: Callable[[], None]) -> None:
    """Leave the start of a Ray on this machine to the first work that this process cannot do.

    Such a start takes seconds, and so does that of its workers; much work is done before.
    """
    global _start
    _start = start


def is_ray_put_off() -> bool:
    """Whether there is no Ray yet, as no work has needed it."""
    return _start is not None


def need_ray() -> None:
    """Start Ray where that was put off."""
    global _start
    if _start is not None:
        start, _start = _start, None
        start()


def find_nodes() -> RayNodes:
    """The nodes of the Ray cluster that this process is connected to, or of the one put off."""
    if is_ray_put_off():
        here = {"NodeID": "", "Alive": True, "Resources": {"CPU": float(logical_cpus())}}
        return RayNodes([here], {})
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
        amounts = {name.strip(): float(amount) for name, amount in pairs}
    except ValueError as error:
        raise InputError(f"{MAX_RESOURCES} is {text!r}; it must be like CPU=64,GPU=8") from error
    unknown = sorted(set(amounts) - set(_KINDS))
    if unknown or any(amount < 0 for amount in amounts.values()):
        raise InputError(f"{MAX_RESOURCES} is {text!r}; it may name CPU and GPU, with amounts")
    return amounts


# Another number than an actor reserves, so that Ray Data keeps the two kinds of workers apart
# instead of fusing them, and small, so that a pipeline fits on a Ray cluster of two CPUs.
TOKENIZE_CPUS = 0.5
DEFAULT_CPUS = 1.0


@dataclass(frozen=True)
class ActorPlan:
    """Between ``smallest`` and ``largest`` encoder actors, each with its reservation."""

    smallest: int
    largest: int
    cpus: float
    gpus: float
    asked: bool = False
    """Whether somebody asked for actors of a number or size."""

    @property
    def threads(self) -> int:
        """Torch threads of one actor."""
        return max(1, round(self.cpus))

    @property
    def tokenizers(self) -> int:
        """Tokenizer tasks at a time: a core tokenizes for a GPU, or for dozens of other cores."""
        return self.largest if self.gpus else max(1, round(self.largest * self.cpus / 32))

    def __str__(self) -> str:
        count = f"{self.smallest} to {self.largest}"
        count = str(self.largest) if self.smallest == self.largest else count
        return f"{count}, each {self.cpus:g} CPUs and {self.gpus:g} GPUs"


def plan_actors(
    resources: Mapping[str, float],
    nodes: int,
    *,
    num_actors: str = "",
    cpus: float | None = None,
    gpus: float | None = None,
) -> ActorPlan:
    """The actors for a Ray cluster; what is not given is found from its resources.

    Args:
        resources: CPUs and GPUs for work that the Ray cluster has, or can add.
        nodes: its number of nodes.
        num_actors: ``N``, ``MIN:MAX``, or empty.
        cpus: CPUs of one actor, or None.
        gpus: GPUs of one actor, or None.

    Raises :class:`InputError` where not even the smallest number fits.
    """
    asked = bool(num_actors) or cpus is not None or gpus is not None
    total_cpus, total_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if not total_cpus:
        raise InputError(
            "this Ray cluster has no CPU for work. Where it can add nodes, submit with "
            "--entrypoint-num-cpus 1, or set SHOAL_MAX_RESOURCES (such as CPU=64,GPU=8) on its head"
        )
    gpus = (1.0 if total_gpus else 0.0) if gpus is None else gpus
    spare = total_cpus - TOKENIZE_CPUS
    # a Ray that was started with more logical CPUs than this machine has gains nothing by them
    cores = min(spare, usable_cpus()) if nodes == 1 else spare
    cpus = min(DEFAULT_CPUS if total_cpus > 2 else 2.0, cores) if cpus is None else cpus
    if cpus <= 0:
        raise InputError(f"cpus_per_actor is {cpus:g}: an actor needs some CPU")
    fitting = int(cores / cpus)
    if gpus:
        fitting = min(int(spare / cpus), int(total_gpus / gpus))
    smallest, largest = _parse_count(num_actors) or (1 if gpus else max(1, fitting), fitting)
    if smallest * cpus > spare or smallest * gpus > total_gpus:
        raise InputError(
            f"{smallest} actors of {cpus:g} CPUs and {gpus:g} GPUs, and {TOKENIZE_CPUS:g} CPU for "
            f"a tokenizer, do not fit this Ray cluster of {total_cpus:g} CPUs and "
            f"{total_gpus:g} GPUs: lower --num-actors, --cpus-per-actor or --gpus-per-actor"
        )
    return ActorPlan(smallest, max(smallest, largest), float(cpus), float(gpus), asked)


def _parse_count(num_actors: str) -> tuple[int, int] | None:
    if not num_actors:
        return None
    first, _, last = num_actors.partition(":")
    try:
        smallest, largest = int(first), int(last or first)
    except ValueError:
        smallest = largest = 0
    if not 1 <= smallest <= largest:
        raise InputError(f"num_actors is {num_actors!r}: give N, or MIN:MAX, from 1 on")
    return smallest, largest
