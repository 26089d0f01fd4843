"""What decides a vector: an encoder's configuration, its resolved description, its fingerprint.

A driver describes an encoder without loading weights; workers load what the description says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pipelines.encoder.adapters import FILE_NAME as ADAPTER_SETTINGS
from pipelines.encoder.prompts import PLACEHOLDER, PromptTemplate
from pipelines.encoder.sources import (
    PACKAGED_ADAPTER,
    PACKAGED_MODEL,
    ModelFiles,
    fetch_adapter,
    fetch_model,
)
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import exists, join, json_bytes, read_bytes, write_bytes
from pipelines.runtime.run_record import settings_of

Pooling = Literal["last", "mean", "body-mean", "weighted-mean", "max", "first", "last+mean"]
"""How token states become a vector.

``last``: the last token's state, which has seen prompt and text. ``mean``: over all tokens.
``body-mean``: over the text's own tokens, prompt excluded. ``weighted-mean``: token i of n weighs
i, as later tokens have seen more (Muennighoff 2022, arXiv:2202.08904). ``max``: the largest value
of each dimension. ``first``: the first token's, for models with a class token. ``last+mean``: both,
one after the other, twice as wide.
"""

POOLINGS: tuple[str, ...] = get_args(Pooling)
POOLING_PARTS = ("last", "mean", "body-mean", "weighted-mean", "max", "first", "mean-sqrt")
"""What a pooling may join by ``+``; ``mean-sqrt`` divides by the root of the tokens' number."""


def pooled_dimension(pooling: str, dimension: int) -> int:
    """Length of a pooled vector of states that are ``dimension`` wide."""
    return dimension * len(pooling.split("+"))


FILE_NAME = "encoder.json"
_ELSEWHERE = "elsewhere"
FORMAT = 1
AUTO_ADAPTER, NO_ADAPTER = "auto", "none"
DEFAULT_PROMPT = "one-word"
DEFAULT_POOLING: Pooling = "last"
DEFAULT_LAYER = -1
DEFAULT_MAX_TOKENS = 256
TOKENIZATION = 3
INT8_ROUNDING = 2
WINDOWS = 2
DType = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Attention = Literal["auto", "causal", "bidirectional"]

# Where things lie and what can be worked out from the rest decide no vector of a document.
_NOT_DECIDING = (
    "model",
    "adapter",
    "dimension",
    "trust_remote_code",
    "query_prompt",
    "query_max_tokens",
    "adapter_effect",
)


@dataclass(frozen=True)
class ModelOptions:
    """Which base model, and how it is run."""

    model: str = PACKAGED_MODEL
    """Base model: a packaged name, a folder, a GGUF file, a hub id or an s3:// folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: DType = "auto"
    """Precision of the forward pass; auto is bfloat16 where that is faster, else float32."""
    append_eos: bool = False
    """Put the end-of-sequence token after the prompt."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for models whose author you trust."""


@dataclass(frozen=True)
class EncoderConfig(ModelOptions):
    """An encoder as asked for."""

    adapter: str | None = AUTO_ADAPTER
    """PEFT adapter to merge into the weights: a folder, local or remote, a hub id, packaged, or
    none; auto is packaged with the packaged model, and none with any other."""
    prompt: str | None = None
    """Name of a prompt, or a template with {text}; by default the adapter's or the model's own,
    else one-word."""
    query_prompt: str | None = None
    """The same for queries to a store; by default the model's own, else as for documents."""
    pooling: str | None = None
    """How token states become one vector: last, mean, body-mean, weighted-mean, max, first, or
    several joined by +; by default the adapter's or the model's own, else last."""
    layer: int | tuple[int, ...] | None = None
    """States after which layer, several are averaged: 0 the token embeddings, -1 the last layer;
    by default the adapter's own, else -1."""
    attention: Attention = "auto"
    """Whether a token sees those after it (bidirectional); auto as the model's files say."""
    max_tokens: int | None = None
    """Tokens of the text itself that are read, the prompt comes on top; by default as many as an
    embedding model's files say, else 256."""
    dimensions: int | None = None
    """Keep only the first N numbers of a vector, for models trained so (Matryoshka)."""
    normalize: bool = True
    """Scale vectors to length 1."""

    def __post_init__(self) -> None:
        PromptTemplate.parse(self.prompt or DEFAULT_PROMPT)
        if self.query_prompt is not None:
            PromptTemplate.parse(self.query_prompt)
        if self.pooling is not None and not set(self.pooling.split("+")) <= set(POOLING_PARTS):
            raise InputError(
                f"unknown pooling {self.pooling!r}; known are {', '.join(POOLING_PARTS)}, and "
                "several of them joined by +"
            )
        if self.attention not in get_args(Attention):
            raise InputError(f"unknown attention {self.attention!r}; known: {get_args(Attention)}")
        if self.dtype not in get_args(DType):
            raise InputError(f"unknown dtype {self.dtype!r}; known are {get_args(DType)}")
        if isinstance(self.dimensions, int) and self.dimensions < 1:
            raise InputError(f"dimensions is {self.dimensions}; it must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.layers == ():
            raise InputError("layer is empty: name at least one layer, such as -1")

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers as a tuple, as they were given."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer

    @property
    def encoder(self) -> EncoderConfig:
        """These options alone, of a configuration that has more."""
        return EncoderConfig(**settings_of(self, EncoderConfig))


@dataclass(frozen=True)
class EncoderDescription:
    """An encoder with everything resolved; the content of ``encoder.json``."""

    model: str
    model_revision: str
    adapter: str | None
    adapter_revision: str | None
    prompt: str
    pooling: str
    layers: tuple[int, ...]
    max_tokens: int
    normalize: bool
    dtype: str
    append_eos: bool
    dimension: int
    trust_remote_code: bool = False
    # Each of these is left out of encoder.json and fingerprint where it is as here.
    attention: str | None = None
    """Attention that is not the model's own."""
    dimensions: int | None = None
    """Numbers that are kept of a vector."""
    lower_case: bool = False
    """Texts are read in lower case."""
    pool_prompt: bool = True
    """The tokens of the prompt are pooled too."""
    projections: tuple[tuple[str, str], ...] = ()
    """Dense layers after pooling: the folder of each within the model's, and its digest."""
    code_digest: str | None = None
    """SHA-256 of the model's own code, where that is run."""
    tokenization: int = 1
    """2 where version 1 gave other tokens to ordinary texts, 3 where version 2 did too."""
    int8_rounding: int = 1
    """2 where int8 turns activations before it rounds them."""
    windows: int = 1
    """2 where windows are those of the attention asked for; 1 counted them as the folder does."""
    query_prompt: str | None = None
    """Prompt of queries, where it is not that of the documents."""
    query_max_tokens: int | None = None
    """Tokens of a query that are read, where its prompt leaves room for more or fewer."""
    adapter_effect: Mapping[str, float] | None = None
    """What the adapter was seen to do when it was loaded."""

    @property
    def deciding(self) -> dict[str, Any]:
        """The fields that decide a vector: no paths, so a copied model stays the same encoder."""
        content = {k: v for k, v in self._settled.items() if k not in _NOT_DECIDING}
        return {"format": FORMAT, **content}

    @property
    def _settled(self) -> dict[str, Any]:
        """All fields, those that came later only where they say something."""
        unsaid = {f.name: f.default for f in fields(self) if f.name != "trust_remote_code"}
        return {k: v for k, v in asdict(self).items() if v != unsaid.get(k, MISSING)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the deciding fields, 64 hexadecimal digits."""
        text = json.dumps(self.deciding, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def commit(self) -> str | None:
        """The hub commit of the model, None where its revision is a digest of its files."""
        return None if self.model_revision.startswith("sha256:") else self.model_revision

    @classmethod
    def elsewhere(cls, name: str, dimension: int) -> EncoderDescription:
        """An encoder of which no more is known than what people call it: vectors made elsewhere."""
        return cls(
            model=name,
            model_revision=f"{_ELSEWHERE}: {name}, {dimension} numbers",
            adapter=None,
            adapter_revision=None,
            prompt=PLACEHOLDER,
            pooling=_ELSEWHERE,
            layers=(),
            max_tokens=0,
            normalize=False,
            dtype="float32",
            append_eos=False,
            dimension=dimension,
        )

    @property
    def is_elsewhere(self) -> bool:
        """Whether its vectors were made elsewhere, so that it can make none."""
        return self.pooling == _ELSEWHERE

    def require_model(self) -> None:
        """Raise :class:`InputError` where its vectors were made elsewhere."""
        if self.is_elsewhere:
            raise InputError(
                f"vectors of {self.model!r} were made elsewhere, so no text can be embedded: "
                "search with --similar-to, or with a vector of yours in Python"
            )

    def for_queries(self, prompt: str | None = None) -> EncoderDescription:
        """The encoder of queries to these vectors: with its query prompt, or with another one."""
        template = str(PromptTemplate.parse(prompt or self.query_prompt or self.prompt))
        if template == self.prompt:
            return self
        own = self.query_max_tokens if template == self.query_prompt else None
        return replace(
            self,
            prompt=template,
            query_prompt=None,
            max_tokens=own or self.max_tokens,
            query_max_tokens=None,
            tokenization=TOKENIZATION,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of ``encoder.json``."""
        return {"format": FORMAT, "fingerprint": self.fingerprint, **self._settled}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EncoderDescription:
        """The description in the content of an ``encoder.json``.

        Raises :class:`InputError` where it is of another format, lacks a field, or was edited:
        its fingerprint must be the one of its fields.
        """
        if content.get("format") != FORMAT:
            raise InputError(
                f"{FILE_NAME} has format {content.get('format')!r}; this version reads {FORMAT}"
            )
        known = {k: v for k, v in content.items() if k not in ("format", "fingerprint")}
        try:
            known["layers"] = tuple(known["layers"])
            known["projections"] = tuple(map(tuple, known.get("projections", ())))
            description = cls(**known)
        except (TypeError, KeyError) as error:
            raise InputError(f"{FILE_NAME} is not an encoder's: {error}") from error
        if content.get("fingerprint") != description.fingerprint:
            raise InputError(
                f"{FILE_NAME} was changed by hand: its fingerprint is not that of its fields; "
                "describe the encoder anew instead"
            )
        return description

    def save(self, folder: str) -> None:
        """Write ``encoder.json`` into ``folder``, local or remote."""
        write_bytes(join(folder, FILE_NAME), json_bytes(self.to_json()))

    @classmethod
    def load(cls, folder: str) -> EncoderDescription:
        """Read ``encoder.json`` from ``folder``; :class:`InputError` where there is none.

        A tuned adapter lies beside its ``encoder.json``. It is taken from there, wherever the
        folder was moved or copied to since.
        """
        path = join(folder, FILE_NAME)
        try:
            description = cls.from_json(json.loads(read_bytes(path)))
        except FileNotFoundError as error:
            raise InputError(f"{folder} holds no {FILE_NAME}: it is no encoder's folder") from error
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        if description.adapter is not None and exists(join(folder, ADAPTER_SETTINGS)):
            return replace(description, adapter=folder)
        return description

    def fetch(self) -> tuple[ModelFiles, ModelFiles | None]:
        """The files of model and adapter on this machine, checked to be the described ones."""
        self.require_model()
        model = fetch_model(self.model, self.commit)
        _check_revision("model", self.model, model.revision, self.model_revision)
        if self.adapter is None:
            return model, None
        adapter = fetch_adapter(self.adapter)
        _check_revision("adapter", self.adapter, adapter.revision, self.adapter_revision)
        return model, adapter


def difference(first: EncoderDescription, second: EncoderDescription) -> str | None:
    """Which deciding field tells two encoders apart, with both values; None if they agree."""
    for name in {**first.deciding, **second.deciding}:
        if name == "format":
            continue
        mine, theirs = getattr(first, name), getattr(second, name)
        if mine != theirs:
            return f"{name}: {mine!r} and {theirs!r}"
    return None


def trained_encoder(adapter: Path) -> EncoderDescription | None:
    """The encoder that the adapter in a folder was trained in; None where it does not say."""
    if not (adapter / FILE_NAME).is_file():
        return None
    return EncoderDescription.load(str(adapter))


def _check_revision(kind: str, name: str, found: str, described: str | None) -> None:
    if found != described:
        raise InputError(
            f"{kind} {name!r} is not the one described: its revision is {found}, the description "
            f"says {described}; fetch that one, or describe the encoder anew"
        )


_OPTIONS = {
    "prompt": "prompt",
    "pooling": "pooling",
    "layers": "layer",
    "append_eos": "append-eos",
    "attention": "attention",
}


def require_as_trained(
    description: EncoderDescription, adapter: str | None, *, action: str = "run"
) -> None:
    """Refuse an encoder that contradicts what ``adapter`` was trained with.

    An adapter that does not say (made elsewhere, without an ``encoder.json``) goes with any.

    Args:
        description: the encoder.
        adapter: a folder, local or remote, or a hub id; None is no adapter.
        action: what the encoder is for, a word for the error.

    Raises:
        InputError: another base model, prompt, pooling, layer or end-of-sequence token.
    """
    trained = None if adapter is None else trained_encoder(fetch_adapter(adapter).folder)
    if trained is None:
        return
    packaged = adapter == PACKAGED_ADAPTER and description.model == PACKAGED_MODEL
    if not packaged and _is_other_model(description.model_revision, trained.model_revision):
        raise InputError(
            f"adapter {adapter} was trained with another base model: {trained.model!r} "
            f"({trained.model_revision}), but this {action} has {description.model!r} "
            f"({description.model_revision}): pass --model {trained.model}"
        )
    field = untrained_field(description, trained)
    if field is not None:
        mine, theirs = getattr(description, field), getattr(trained, field)
        way = (
            "give --append-eos as in training"
            if field == "append_eos"
            else (f"leave --{_OPTIONS[field]} out to take the adapter's")
        )
        raise InputError(
            f"adapter {adapter} was trained with another {field}: {theirs!r}, but this "
            f"{action} has {mine!r}: {way}, or use another adapter"
        )


def untrained_field(description: EncoderDescription, trained: EncoderDescription) -> str | None:
    """The first setting in which an encoder is not as its adapter was trained; None if none."""
    return next((f for f in _OPTIONS if getattr(description, f) != getattr(trained, f)), None)


def _is_other_model(found: str, trained: str) -> bool:
    """Whether two revisions differ; a digest of files and a hub commit cannot be compared."""
    same_kind = found.startswith("sha256:") == trained.startswith("sha256:")
    return same_kind and found != trained
