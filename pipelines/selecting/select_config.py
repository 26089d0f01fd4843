"""The options of the selection job."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipelines.encoding.encoder_description import DType, EncoderConfig
from pipelines.errors import InputError
from pipelines.model_sources import PACKAGED_MODEL
from pipelines.pooling import POOLINGS, Pooling
from pipelines.prompts import PromptTemplate
from pipelines.storage import default_output

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
MAY_CHANGE = ("num_actors", "cpus_per_actor")


@dataclass(frozen=True)
class SelectConfig:
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
    model: str = PACKAGED_MODEL
    """Base model: a packaged name, a folder, a GGUF file, a hub id or an s3:// folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    adapter: str | None = None
    """PEFT adapter to merge into the weights: a folder, local or remote, or a hub id."""
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
    dtype: DType = "auto"
    """Precision of the forward pass; auto is bfloat16 where that is faster, else float32."""
    append_eos: bool = False
    """Put the end-of-sequence token after the prompt."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for models whose author you trust."""
    num_actors: int = 0
    """Prompts tried at once, a GPU each where there are any; 0 finds it from the Ray cluster."""
    cpus_per_actor: float | None = None
    """CPUs, and so threads, for each."""
    seed: int = 0
    """Another one draws other documents and other starts of k-means."""

    def __post_init__(self) -> None:
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
            model=self.model, revision=self.revision, adapter=self.adapter, prompt=prompt,
            pooling=self.poolings[0], max_tokens=self.max_tokens, normalize=self.normalize,
            dtype=self.dtype, append_eos=self.append_eos,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

    def candidate(self, prompt: str, pooling: Pooling, layer: int) -> EncoderConfig:
        """The encoder of one candidate."""
        return replace(self.encoder(prompt), pooling=pooling, layer=layer)
