"""The options of a fine-tuning run, and of the pairs that it can be made from."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from pipelines.corpus.files import Columns, CorpusOptions
from pipelines.encoder.description import AUTO_ADAPTER, EncoderConfig
from pipelines.encoder.sources import PACKAGED_MODEL
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import default_output
from pipelines.runtime.run_record import may_change, settings_of

Quantize = Literal["none", "8bit", "4bit"]
"""Bits of a base model's weights in training; ``none`` leaves them in the encoder's dtype."""


_LOWEST_TEMPERATURE = 0.01


@dataclass(frozen=True)
class LossSettings:
    """What decides the loss."""

    temperature: float = 0.05
    """Cosines are divided by it; lower looks harder at the nearest negatives."""
    learn_temperature: bool = False
    """Train the temperature too, from the given one on."""
    both_directions: bool = True
    """Also look for each positive's anchor, and average the two losses."""
    margin: float = 0.0
    """Taken off a pair's own cosine, so that it must win by as much."""
    dimensions: tuple[int, ...] = ()
    """Lengths to which vectors are also cut in training (Matryoshka), so that they can be later;
    Kusupati et al. 2022, arXiv:2205.13147."""

    def __post_init__(self) -> None:
        if not _LOWEST_TEMPERATURE <= self.temperature <= 10:
            raise InputError(
                f"temperature is {self.temperature}; it must be {_LOWEST_TEMPERATURE} to 10"
            )
        if not 0 <= self.margin < 1:
            raise InputError(f"margin is {self.margin}; it must be at least 0 and below 1")
        if any(length < 1 for length in self.dimensions):
            raise InputError(f"dimensions are {self.dimensions}; each must be at least 1")


@dataclass(frozen=True)
class LoraSettings:
    """What shapes an adapter and its start."""

    lora_rank: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapter."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get an adapter."""
    seed: int = 0
    """Decides everything random: the adapter's start, the crops, the batches, dropout."""


@dataclass(frozen=True)
class TrainerSettings(LoraSettings, LossSettings):
    """What decides a trained adapter, the pairs and the encoder apart."""

    teacher: str | None = None
    """Encoder that the adapter learns from which texts are alike: a model such as
    all-mpnet-base-v2, or a folder with encoder.json. Short texts of a corpus then stay whole."""
    max_steps: int = 100
    """Steps at most."""
    learning_rate: float = 5e-4
    """Highest learning rate of AdamW."""
    warmup_steps: int = 10
    """Steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_gradient_norm: float = 1.0
    """Longer gradients are scaled down to it."""
    gradient_checkpointing: bool = False
    """Compute activations twice in place of keeping them: slower, for long texts, large models."""
    activation_tokens: int = 0
    """Tokens whose activations are in memory at once, whatever the batch; 0 suits the hardware."""
    quantize: Quantize = "none"
    """Base model's weights in training: as they are, or in 8 or 4 bits on a CUDA GPU."""


Method = Literal["auto", "crop", "noise", "dropout", "paraphrase", "backtranslate"]


@dataclass(frozen=True)
class PairsConfig(CorpusOptions):
    """Make training pairs from a corpus."""

    corpus: str = ""
    """File, folder or glob of documents, local or remote; empty is a packaged corpus."""
    output: str = field(default_factory=lambda: default_output("generate_pairs"))
    """Folder of the result, local or remote; an unfinished run in it is gone on with."""
    text_column: str = "text"
    """Column of the text."""
    id_column: str | None = None
    """Column of the id; by default `id` where a file has it, else the text's SHA-256 is the id."""
    label_column: str | None = None
    """Column to carry along as `label`."""
    method: Method = "auto"
    """How the two sides of a pair are made; auto takes for each text what its length allows."""
    crop_words: tuple[int, int] = (16, 32)
    """Fewest and most words of a crop."""
    halves: bool = True
    """With auto, pair the halves of a text too short for two crops; else it and its noisy copy."""
    noise_rate: float = 0.1
    """Share of words that are deleted, of those swapped, and of those mistyped."""
    pairs_per_document: int = 1
    """Pairs made of each document, each with new random numbers."""
    model: str = PACKAGED_MODEL
    """Instruct LLM for paraphrase; seq2seq model for backtranslate, into the other language."""
    back_model: str | None = None
    """Seq2seq model for backtranslate, back into the corpus's language."""
    most_tokens: int = 96
    """Tokens of a text that a model reads, and that it writes at most."""
    batch_texts: int = 16
    """Texts that a model rewrites together."""
    num_actors: int = 1
    """Actors that each load the models of paraphrase or backtranslate."""
    seed: int = 0
    """Decides everything random."""

    def __post_init__(self) -> None:
        self.check_reading()
        if self.method not in get_args(Method):
            raise InputError(f"unknown method {self.method!r}; known are {get_args(Method)}")
        fewest, most = self.crop_words
        if not 1 <= fewest <= most:
            raise InputError(f"crop_words is {self.crop_words}; 1 <= fewest <= most is required")
        if not 0 < self.noise_rate <= 0.3:
            raise InputError(f"noise_rate is {self.noise_rate}; above 0 and at most 0.3 required")
        for name in ("pairs_per_document", "most_tokens", "batch_texts", "num_actors"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if (self.method == "backtranslate") != (self.back_model is not None):
            raise InputError(
                "method backtranslate needs --model and --back-model, two translation models; no "
                f"other method takes --back-model (found method {self.method})"
            )

    @property
    def columns(self) -> Columns:
        """The columns to read."""
        return Columns(
            self.text_column, self.id_column, (self.label_column,) if self.label_column else ()
        )


_WORKERS = re.compile(r"(\d+)(?::(\d+))?")


@dataclass(frozen=True)
class FinetuneConfig(CorpusOptions, TrainerSettings, EncoderConfig):
    """Tune a LoRA adapter on pairs of texts that mean the same."""

    adapter: str | None = AUTO_ADAPTER
    """Adapter to go on from: a folder, local or remote, a hub id, packaged, or none for a new one;
    auto is packaged with the packaged model if rank, alpha and targets are its own, else none."""
    pairs: str = ""
    """Pairs to train on: output of generate_pairs, or Parquet, CSV or JSON lines
    with anchor, positive."""
    corpus: str = ""
    """Documents to make pairs from, in place of --pairs; with neither, a packaged corpus."""
    output: str = field(default_factory=lambda: default_output("finetune_adapter"))
    """Folder of the adapter, local or remote; an unfinished run in it is gone on with."""
    text_column: str = "text"
    """Column of the text in the corpus."""
    id_column: str | None = None
    """Column of the id in the corpus; by default `id` where a file has it, else a content hash."""
    label_column: str | None = None
    """Column of labels: where at most half of the texts have one, pairs of one label are added to
    the training; else they are only measured by (V-measure of held-out pairs)."""
    crop_words: tuple[int, int] = (16, 32)
    """Fewest and most words of a crop of the corpus."""
    batch_pairs: int = 64
    """Pairs a step on all workers together; each has all others as its negatives."""
    dimensions: tuple[int, ...] = ()  # type: ignore[assignment]  # in place of one to cut to
    """Shorter lengths that vectors shall be good at too (Matryoshka); the full one is added."""
    heldout_pairs: int | None = None
    """Pairs kept from training to measure on; by default 128, of few pairs a tenth."""
    measure_every: int = 20
    """Steps between measures; each also writes a checkpoint."""
    patience: int = 0
    """Stop after so many measures without a new best; 0 never stops early."""
    sentence_transformers: bool = False
    """Also write the merged model as a folder that sentence-transformers opens; local outputs."""
    num_workers: str = may_change("1")
    """Training workers: N, or MIN:MAX to go on with fewer; 0 trains in the driver's process."""
    cpus_per_worker: float | None = may_change(None)
    """CPUs, and so threads, of a worker; by default its share of the machine."""
    gpus_per_worker: float | None = may_change(None)
    """GPUs of a worker; 1 by default where the Ray cluster has any."""
    max_failures: int = may_change(3)
    """Lost workers after which the run gives up; it can be gone on with."""

    def __post_init__(self) -> None:
        EncoderConfig.__post_init__(self)
        LossSettings.__post_init__(self)
        self.check_reading()
        self._check_sources()
        least = {
            "max_steps": 1, "batch_pairs": 2, "lora_rank": 1, "measure_every": 1,
            "heldout_pairs": 2, "warmup_steps": 0, "activation_tokens": 0, "patience": 0,
            "max_failures": -1,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {smallest}")
        for name in ("learning_rate", "lora_alpha", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout}; from 0 to below 1 is required")
        if self.teacher == "":
            raise InputError(
                "teacher is empty: name a model or a folder with encoder.json, or leave it out"
            )
        if self.dtype in ("float16", "int8"):
            raise InputError(f"dtype {self.dtype} cannot train: use bfloat16 or float32")
        if self.quantize not in get_args(Quantize):
            raise InputError(
                f"unknown quantize {self.quantize!r}; known are {', '.join(get_args(Quantize))}"
            )
        smallest, largest = self.workers
        if smallest > largest or (smallest == 0 < largest):
            raise InputError(f"num_workers is {self.num_workers!r}; N or MIN:MAX is required")
        if largest > self.batch_pairs:
            raise InputError(
                f"num_workers is {self.num_workers}, more than the {self.batch_pairs} pairs of a "
                "batch: each worker needs one, so raise --batch-pairs"
            )
        _ = self.pairs_config

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most workers."""
        found = _WORKERS.fullmatch(self.num_workers)
        if found is None:
            raise InputError(
                f"num_workers is {self.num_workers!r}; give a number, or MIN:MAX such as 1:4"
            )
        return int(found[1]), int(found[2] or found[1])

    @property
    def encoder(self) -> EncoderConfig:
        """The encoder that is tuned, with the adapter that is gone on from."""
        return EncoderConfig(**settings_of(self, EncoderConfig) | {"dimensions": None})

    @property
    def pairs_config(self) -> PairsConfig:
        """How pairs are made of the corpus."""
        return PairsConfig(
            corpus=self.corpus,
            text_column=self.text_column,
            id_column=self.id_column,
            label_column=self.label_column,
            crop_words=self.crop_words,
            halves=self.teacher is None,
            seed=self.seed,
            **asdict(self.reading),
        )

    @property
    def trainer(self) -> TrainerSettings:
        """What decides the adapter on given pairs."""
        return TrainerSettings(**settings_of(self, TrainerSettings))

    def _check_sources(self) -> None:
        if self.pairs and self.corpus:
            raise InputError("both --pairs and --corpus are given: pairs come from one of them")
        if not self.pairs:
            return
        self.check_unused("with --pairs")
        defaults = FinetuneConfig.__dataclass_fields__
        for name in ("text_column", "id_column", "crop_words"):
            if getattr(self, name) != defaults[name].default:
                option = name.replace("_", "-")
                raise InputError(f"--{option} has no effect with --pairs: drop it")
