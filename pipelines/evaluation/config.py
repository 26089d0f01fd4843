"""Options of the jobs that look for an encoder, score encoders and look into one."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.corpus.files import CorpusOptions
from pipelines.corpus.passages import PassageOptions
from pipelines.encoder.description import (
    AUTO_ADAPTER,
    POOLINGS,
    EncoderConfig,
    ModelOptions,
    Pooling,
)
from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.sources import PACKAGED_ADAPTER, PACKAGED_MODEL
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import default_output
from pipelines.runtime.run_record import may_change, settings_of

DEFAULT_PROMPTS = ("one-word", "cluster", "summary", "classification", "none")
# Not "first": a decoder's first token has seen nothing of the text.
DEFAULT_POOLINGS: tuple[Pooling, ...] = (
    "last",
    "mean",
    "body-mean",
    "weighted-mean",
    "last+mean",
)
FEWEST_DOCUMENTS = 20


@dataclass(frozen=True)
class SelectConfig(CorpusOptions, PassageOptions, ModelOptions):
    """Choose prompt, pooling and layer for a corpus."""

    corpus: str = ""
    """File, folder or glob of documents, local or remote; empty is the demo corpus."""
    text_column: str = "text"
    """Column of the text."""
    label_column: str | None = None
    """Column of labels to score candidates by; without it they are scored by the texts alone."""
    documents: int = 500
    """Documents of the sample: those whose texts hash lowest."""
    output: str = field(default_factory=lambda: default_output("select_encoder"))
    """Folder of the result, local or remote; an unfinished run in it is gone on with."""
    adapter: str | None = None
    """PEFT adapter to merge into the weights: a folder, local or remote, or a hub id."""
    adapters: tuple[str, ...] = (AUTO_ADAPTER,)
    """PEFT adapters to try too, each with the prompt, pooling and layer it was trained with; auto
    is the packaged one with the packaged model, and none with any other."""
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    """Prompts to try: names, or templates with {text}; each costs one forward pass."""
    poolings: tuple[Pooling, ...] = DEFAULT_POOLINGS
    """Poolings to try; they cost no forward pass."""
    layers: tuple[int, ...] = ()
    """Layers to try; all by default, and none costs a forward pass."""
    num_clusters: int = 0
    """Clusters to score with; 0 takes the number of labels, or several numbers without labels."""
    max_tokens: int = 256
    """Tokens of the text itself that are read; the prompt comes on top."""
    normalize: bool = True
    """Scale vectors to length 1."""
    num_actors: int = may_change(0)
    """Prompts tried at once, a GPU each where there are any; 0 finds it from the Ray cluster."""
    cpus_per_actor: float | None = may_change(None)
    """CPUs, and so threads, for each."""
    seed: int = 0
    """Another one draws other documents and other starts of k-means."""

    def __post_init__(self) -> None:
        self.check_reading()
        self.check_passages()
        if not self.prompts or not self.poolings:
            raise InputError("prompts and poolings must name one each at least")
        for pooling in self.poolings:
            if pooling not in POOLINGS:
                raise InputError(f"unknown pooling {pooling!r}; known are {', '.join(POOLINGS)}")
        templates = [str(PromptTemplate.parse(prompt)) for prompt in self.prompts]
        if len(set(templates)) < len(templates):
            raise InputError(f"prompts {list(self.prompts)} name one prompt twice")
        if self.documents < FEWEST_DOCUMENTS:
            raise InputError(
                f"documents is {self.documents}; at least {FEWEST_DOCUMENTS} are needed"
            )
        if self.num_clusters < 0 or self.num_clusters == 1:
            raise InputError(f"num_clusters is {self.num_clusters}; it must be 0, or 2 and more")

    def encoder(self, prompt: str) -> EncoderConfig:
        """The encoder with one of the prompts, of the last layer and the first pooling."""
        return EncoderConfig(
            **settings_of(self, ModelOptions), adapter=self.adapter, prompt=prompt,
            pooling=self.poolings[0], max_tokens=self.max_tokens, normalize=self.normalize,
        )  # fmt: skip

    @property
    def tried_adapters(self) -> tuple[str, ...]:
        """The adapters to try, by name."""
        own = self.model == PACKAGED_MODEL and self.adapter is None
        auto = (PACKAGED_ADAPTER,) if own else ()
        named = [auto if name == AUTO_ADAPTER else (name,) for name in self.adapters]
        return tuple(name for names in named for name in names)


@dataclass(frozen=True)
class AttentionConfig(CorpusOptions, ModelOptions):
    """See what the last token attends to, before and after tuning."""

    text: str = ""
    """One text to look at."""
    corpus: str = ""
    """Documents to average over, in place of one text: file, folder or glob; the demo corpus where
    neither is given."""
    text_column: str = "text"
    """Column of the corpus's text."""
    id_column: str | None = None
    """Column of the id; by default `id` where a file has it, else the text's SHA-256 is the id."""
    documents: int = 100
    """Documents of the corpus to average over."""
    output: str = field(default_factory=lambda: default_output("inspect_attention"))
    """Folder of the result, local or remote."""
    adapters: tuple[str, ...] = ()
    """PEFT adapters to compare the model without one with: folders, local or remote, or hub ids."""
    prompt: str = "one-word"
    """Name of a prompt, or a template with {text}."""
    layer: int = -1
    """Whose attention: 1 the first layer, -1 the last."""
    max_tokens: int = 256
    """Tokens of the text itself that are read; the prompt comes on top."""
    seed: int = 0
    """Another one draws other documents."""

    def __post_init__(self) -> None:
        self.check_reading()
        if self.text and self.corpus:
            raise InputError("both --text and --corpus were given: give one of them")
        if self.text:
            self.check_unused("with --text")
        if self.documents < 1:
            raise InputError(f"documents is {self.documents}; it must be at least 1")
        if self.layer == 0:
            raise InputError("layer 0 is the token embeddings, which attend to nothing: 1 is first")

    def encoder(self, adapter: str | None) -> EncoderConfig:
        """The encoder with one of the adapters, or with none."""
        return EncoderConfig(
            **settings_of(self, ModelOptions), adapter=adapter, prompt=self.prompt,
            layer=self.layer, max_tokens=self.max_tokens,
        )  # fmt: skip


DEFAULT_TASKS = ("20newsgroups", "reuters-r8")


@dataclass(frozen=True)
class EvaluateConfig(CorpusOptions, EncoderConfig):
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
    num_actors: int = may_change(0)
    """Encoders at work at once, a GPU each where there are any; 0 finds it from the Ray cluster."""
    cpus_per_actor: float | None = may_change(None)
    """CPUs, and so threads, of one of them."""
    skip_unreachable_tasks: bool = may_change(False)
    """Go on without tasks whose data cannot be had, and list them in scores.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_reading()
        if not self.corpus:
            self.check_unused("without --corpus")
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
