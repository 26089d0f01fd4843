"""The options of the attention job."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.encoding.encoder_description import DType, EncoderConfig
from pipelines.errors import InputError
from pipelines.model_sources import PACKAGED_MODEL
from pipelines.storage import default_output


@dataclass(frozen=True)
class AttentionConfig:
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
    model: str = PACKAGED_MODEL
    """Base model: a packaged name, a folder, a GGUF file, a hub id or an s3:// folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    adapters: tuple[str, ...] = ()
    """PEFT adapters to compare the model without one with: folders, local or remote, or hub ids."""
    prompt: str = "one-word"
    """Name of a prompt, or a template with {text}."""
    layer: int = -1
    """Whose attention: 1 the first layer, -1 the last."""
    max_tokens: int = 256
    """Tokens of the text itself that are read; the prompt comes on top."""
    dtype: DType = "auto"
    """Precision of the forward pass; auto is bfloat16 where that is faster, else float32."""
    append_eos: bool = False
    """Put the end-of-sequence token after the prompt."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for models whose author you trust."""
    seed: int = 0
    """Another one draws other documents."""

    def __post_init__(self) -> None:
        if self.text and self.corpus:
            raise InputError("both --text and --corpus were given: give one of them")
        if self.documents < 1:
            raise InputError(f"documents is {self.documents}; it must be at least 1")
        if self.layer == 0:
            raise InputError("layer 0 is the token embeddings, which attend to nothing: 1 is first")

    def encoder(self, adapter: str | None) -> EncoderConfig:
        """The encoder with one of the adapters, or with none."""
        return EncoderConfig(
            model=self.model, revision=self.revision, adapter=adapter, prompt=self.prompt,
            layer=self.layer, max_tokens=self.max_tokens, dtype=self.dtype,
            append_eos=self.append_eos, trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
