"""The options of an embedding run, and those of them that a nightly run shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.corpus.files import Columns, CorpusOptions
from pipelines.corpus.passages import PASSAGE_COLUMNS, PassageOptions
from pipelines.encoder.description import EncoderConfig
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import default_output
from pipelines.runtime.run_record import may_change


@dataclass(frozen=True)
class ActorOptions:
    """What a person may say of encoder actors; it decides no vector."""

    num_actors: str = may_change("")
    """Encoder actors: N, or MIN:MAX; found from the Ray cluster by default."""
    cpus_per_actor: float | None = may_change(None)
    """CPUs, and so threads, of one encoder actor."""
    gpus_per_actor: float | None = may_change(None)
    """GPUs of one encoder actor; 1 by default where the Ray cluster has any."""


RESERVED_COLUMNS = ("text_sha256", "embedding")
DEMO_KEPT_COLUMNS = ("text", "label")


@dataclass(frozen=True)
class EmbedConfig(CorpusOptions, PassageOptions, ActorOptions, EncoderConfig):
    """Embed a corpus."""

    corpus: str = ""
    """File, folder or glob of documents, local or remote; empty is the demo corpus."""
    output: str = field(default_factory=lambda: default_output("embed_corpus"))
    """Folder of the result, local or remote; an unfinished run in it is gone on with."""
    text_column: str = "text"
    """Column of the text."""
    id_column: str | None = None
    """Column of the id; by default `id` where a file has it, else the text's SHA-256 is the id."""
    keep_columns: tuple[str, ...] = ()
    """Columns to carry along, such as text or a label."""
    max_rejected_fraction: float = may_change(0.5)
    """Fail where a larger share of the documents is rejected."""
    skip_unreadable_files: bool = may_change(False)
    """Go on without files that cannot be read, and list them in rejected/."""
    target_file_mib: int = 128
    """About how large a file of the result should be, in MiB."""
    float16: bool = False
    """Store vectors in half precision."""
    chunk_tokens: int = 0
    """Tokens of a unit of work, which a kill can cost; 0 suits the hardware."""
    compile_model: bool = may_change(False)
    """Fuse the encoder's work between matrix products: slower to start, then faster."""
    dry_run: bool = False
    """Print what would be done, and how long it would take; write nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_reading()
        self.check_passages()
        if not 0 <= self.max_rejected_fraction <= 1:
            raise InputError(
                f"max_rejected_fraction is {self.max_rejected_fraction}; it must be from 0 to 1"
            )
        if self.target_file_mib < 1 or self.chunk_tokens < 0:
            raise InputError("target_file_mib must be at least 1, and chunk_tokens not negative")
        own = ("id", *(PASSAGE_COLUMNS if self.passages else ()), *RESERVED_COLUMNS)
        keep = self.keep_columns
        if set(own) & set(keep) or len(set(keep)) < len(keep):
            raise InputError(
                f"keep_columns {list(keep)}: each column once, and not {', '.join(own[:-1])} or "
                f"{own[-1]}, which the result has by itself"
            )

    @property
    def columns(self) -> Columns:
        """The columns to read."""
        keep = self.keep_columns
        if not self.corpus and not keep:
            keep = DEMO_KEPT_COLUMNS
        return Columns(self.text_column, self.id_column, keep)
