"""How many encoder actors a Ray cluster gets, and what each reserves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.errors import InputError

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
    total_cpus, total_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if not total_cpus:
        raise InputError(
            "this Ray cluster has no CPU for work. Where it can add nodes, submit with "
            "--entrypoint-num-cpus 1, or set SHOAL_MAX_RESOURCES (such as CPU=64,GPU=8) on its head"
        )
    gpus = (1.0 if total_gpus else 0.0) if gpus is None else gpus
    spare = total_cpus - TOKENIZE_CPUS
    # a Ray that was started with more logical CPUs than this machine has gains nothing by them
    cores = min(spare, os.cpu_count() or 1) if nodes == 1 else spare
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
    return ActorPlan(smallest, max(smallest, largest), float(cpus), float(gpus))


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
