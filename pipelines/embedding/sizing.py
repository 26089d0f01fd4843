"""Documents to hours, machines and money.

Run as ``python -m pipelines.embedding.sizing --documents 10000000``.

Rates come from measurements: those of :data:`MEASURED` by the commands that it names, and the
encoder's (``--tokens-per-second``) from ``embed_corpus.py --dry-run`` on the machine that will do
the work. Without it the encoder's rate is an estimate from the accelerator's peak, and the table
says so. docs/sizing.md names every assumption.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pipelines.runtime.command import parse
from pipelines.runtime.errors import InputError

# A core's rates. Read: `benchmarks/pipeline.py state`, documents of about 27 characters.
# Cluster: `benchmarks/kmeans.py --only on_disk`, vectors of 128 numbers, 256 clusters: half of the
# whole job, which reads every vector twice. A test compares them with benchmarks/results.
MEASURED = {"read": 22_624.0, "cluster": 26_803.0, "work_bytes": 33.6}
MEASURED_CHARACTERS = 27
MEASURED_NUMBERS = 128
MEASURED_CLUSTERS = 256
GIB = 2**30
FLOAT_BYTES = 4
# What the other columns and Parquet's own bytes add to vectors.
ID_BYTES = 80


@dataclass(frozen=True)
class Sizing:
    """A corpus, the machines, and their prices."""

    documents: int = 10_000_000
    """Documents of the corpus."""
    tokens_per_document: int = 256
    """Tokens of a document and its prompt, after the cut at --max-tokens."""
    characters_per_document: int = 1_000
    """Characters that are read of a document, whether embedded or not."""
    tokens_per_second: float = 0.0
    """Of one encoder actor, as `embed_corpus.py --dry-run` measures it; 0 estimates it."""
    model_parameters: float = 0.6e9
    """For the estimate: parameters that a token passes, without the token embeddings."""
    peak_teraflops: float = 121.0
    """For the estimate: the accelerator's dense bfloat16 peak; 121 is an L4's by its data sheet."""
    utilization: float = 0.35
    """For the estimate: the share of the peak that is reached; an assumption."""
    dimension: int = 1_024
    """Numbers of a vector."""
    num_clusters: int = 1_000
    """Clusters."""
    accelerators: int = 8
    """Encoder actors at a time, one an accelerator machine."""
    cpu_machines: int = 4
    """CPU workers."""
    cores_per_machine: int = 16
    """Cores of a CPU worker."""
    accelerator_price: float = 0.40
    """Dollars an hour of an accelerator machine; look up yours."""
    cpu_price: float = 0.77
    """Dollars an hour of a CPU worker; look up yours."""
    head_price: float = 0.19
    """Dollars an hour of the head; look up yours."""
    storage_price: float = 0.023
    """Dollars a GiB and month of the object store; look up yours."""
    changed_share: float = 0.01
    """Share of the documents that is new or changed each night."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            optional = name in ("tokens_per_second", "changed_share") or name.endswith("_price")
            if value < 0 or (value == 0 and not optional):
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
        if self.utilization > 1 or self.changed_share > 1:
            raise InputError("--utilization and --changed-share are shares: at most 1")

    @property
    def actor_tokens_per_second(self) -> float:
        """Measured, or 2 operations a parameter and token at the assumed share of the peak."""
        estimate = self.peak_teraflops * 1e12 * self.utilization / (2 * self.model_parameters)
        return self.tokens_per_second or estimate


@dataclass(frozen=True)
class Stage:
    """One stage of a run over all documents."""

    name: str
    seconds: float
    machines: int
    price: float
    """Dollars a machine and hour."""
    turn: str
    """What makes it faster."""

    @property
    def dollars(self) -> float:
        """What its machines cost while it runs."""
        return self.seconds / 3600 * self.machines * self.price


def stages_of(sizing: Sizing) -> list[Stage]:
    """The stages of embedding and clustering, one after the other."""
    documents, cores = sizing.documents, sizing.cpu_machines * sizing.cores_per_machine
    text = max(1.0, sizing.characters_per_document / MEASURED_CHARACTERS)
    numbers = max(1.0, sizing.dimension / MEASURED_NUMBERS)
    clusters = max(1.0, sizing.num_clusters / MEASURED_CLUSTERS)
    tokens = documents * sizing.tokens_per_document
    cpu = (sizing.cpu_machines, sizing.cpu_price)

    reading = documents * text / (MEASURED["read"] * cores)
    assigning = documents * numbers * clusters / (MEASURED["cluster"] * cores)
    return [
        Stage("read, check, sort", reading, *cpu, "more CPU workers, more files"),
        Stage(
            "embed",
            tokens / (sizing.actor_tokens_per_second * sizing.accelerators),
            sizing.accelerators,
            sizing.accelerator_price,
            "more or faster GPUs, --max-tokens, a smaller model",
        ),
        Stage("write", reading, *cpu, "more CPU workers, --float16"),
        Stage(
            "cluster",
            2 * assigning,  # once to check and sample, once to assign
            *cpu,
            "more CPU workers, fewer clusters, --two-level",
        ),
    ]


def storage_bytes(sizing: Sizing) -> dict[str, float]:
    """Bytes of what is kept, and of the folder of unfinished work at its fullest."""
    row = sizing.dimension * FLOAT_BYTES + ID_BYTES
    vectors = float(sizing.documents * row)
    return {
        "embeddings": vectors,
        "assignments": float(sizing.documents * (ID_BYTES + 24)),
        "unfinished work": sizing.documents * MEASURED["work_bytes"] + vectors,
    }


def nightly(sizing: Sizing) -> tuple[float, float]:
    """Hours and dollars of a night: changed documents embedded, all read and assigned again."""
    seconds = dollars = 0.0
    for stage in stages_of(sizing):
        share = 1.0 if stage.name in ("read, check, sort", "cluster") else sizing.changed_share
        seconds += stage.seconds * share
        dollars += stage.dollars * share
    return seconds / 3600, dollars + seconds / 3600 * sizing.head_price


def render(sizing: Sizing) -> Table:
    """The answer as a table."""
    stages = stages_of(sizing)
    total = sum(stage.seconds for stage in stages)
    slowest = max(stages, key=lambda stage: stage.seconds)
    table = Table(title=f"{sizing.documents:,} documents", title_justify="left")
    for name in ("stage", "hours", "machines", "dollars", "to make it faster"):
        table.add_column(name, justify="right" if name in ("hours", "dollars") else "left")
    for stage in stages:
        mark = " (bottleneck)" if stage is slowest else ""
        table.add_row(
            stage.name + mark, f"{stage.seconds / 3600:,.1f}", str(stage.machines),
            f"{stage.dollars:,.0f}", stage.turn,
        )  # fmt: skip
    head = total / 3600 * sizing.head_price
    dollars = sum(stage.dollars for stage in stages) + head
    hours, night = nightly(sizing)
    for name, spent, cost in (
        ("the head, meanwhile", total / 3600, head),
        ("all", total / 3600, dollars),
        (f"a night, {sizing.changed_share:.1%} changed", hours, night),
    ):
        table.add_row(name, f"{spent:,.1f}", "", f"{cost:,.0f}", "")
    for name, size in storage_bytes(sizing).items():
        month = size / GIB * sizing.storage_price
        kept = "while it runs" if name == "unfinished work" else f"{month:,.0f} dollars a month"
        table.add_row(name, "", f"{size / GIB:,.0f} GiB", "", kept)
    return table


def main(arguments: Sequence[str]) -> int:
    """Print the table; 2 for bad options."""
    try:
        sizing = parse(Sizing, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    kind = "measured" if sizing.tokens_per_second else "ESTIMATED, not measured"
    Console().print(render(sizing))
    Console().print(f"An encoder actor: {sizing.actor_tokens_per_second:,.0f} tokens/s, {kind}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
