"""One rank's part of contrastive LoRA training: the model, one step, measures, the state.

No Ray here. Everything random is a function of seed and step: LoRA's start, the batches, and the
dropout of every text. A state is therefore the step, the weights and the optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import sklearn.cluster
import sklearn.exceptions
import sklearn.metrics
import torch
from torch import Tensor, nn

from pipelines.encoder.base_model import load_base_model
from pipelines.encoder.decoder import check_attention
from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.encoder import (
    Encoder,
    even_budget,
    inner_width,
    keep_freed_memory,
    token_budget_batches,
)
from pipelines.encoder.packed import can_pack
from pipelines.encoder.padded import cut_layers, find_layers, pad_right, read_states
from pipelines.encoder.pooling import normalize, pool
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.threads import side_by_side
from pipelines.training.adapter import (
    add_adapter,
    enable_checkpointing,
    load_quantized_base,
    require_quantization,
)
from pipelines.training.batches import rank_slice, share_keys, sketch, text_keys
from pipelines.training.config import Quantize, TrainerSettings
from pipelines.training.lean import install_row_dropout, lighten
from pipelines.training.loss import (
    ContrastiveLoss,
    PairKeys,
    agreement,
    backward_in_parts,
    gather_rows,
    sum_gradients,
    sum_over_ranks,
)

MEASURES = (
    "heldout_loss",
    "recall_at_1",
    "mrr",
    "half_agreement",
    "teacher_agreement",
    "alignment",
    "uniformity",
    "v_measure",
)
"""What a history may say of held-out pairs."""
DETAIL = "detail"
"""Under this name a measure has what its means are of, by pair."""


def partner_measures(anchors: Tensor, positives: Tensor) -> dict[str, float]:
    """Measures of n held-out pairs, averaged over both directions.

    Args:
        anchors: float (n, d), not necessarily normalised.
        positives: float (n, d), in the same order.

    Returns:
        ``recall_at_1``: share of texts whose nearest partner is their own, 0 to 1, higher better.
        ``mrr``: mean of 1 / the own partner's rank, 0 to 1, higher better. ``alignment``: mean
        squared distance of partners, 0 to 4, lower better. ``uniformity``: log of the mean of
        exp(-2 squared distance) over different texts, at most 0, lower better; 0 for one pair.
    """
    anchors, positives = normalize(anchors), normalize(positives)
    own = (anchors * positives).sum(dim=1)
    ranks = partner_ranks(anchors, positives)
    return {
        "recall_at_1": float((ranks == 1).float().mean()),
        "mrr": float((1 / ranks).mean()),
        "alignment": float((2 - 2 * own).mean()),
        "uniformity": (uniformity(anchors) + uniformity(positives)) / 2,
    }


def partner_ranks(anchors: Tensor, positives: Tensor) -> Tensor:
    """Float (2, n): ranks, from 1, of each positive for its anchor, and of each anchor."""
    cosines = normalize(anchors) @ normalize(positives).T
    own = cosines.diagonal()
    return torch.stack(
        [1 + (cosines > own[:, None]).sum(dim=1), 1 + (cosines > own[None, :]).sum(dim=0)]
    ).float()


_CLUSTER_RUNS = 3
_PAIRS_A_CLUSTER = 8


def cluster_sides(anchors: Tensor, positives: Tensor) -> list[list[list[int]]]:
    """Clusters of the anchors and of the positives (n each), for each of some runs of k-means."""
    both = np.ascontiguousarray(normalize(torch.cat([anchors, positives])).cpu().numpy())
    n = len(anchors)
    count = max(2, n // _PAIRS_A_CLUSTER)
    runs = []
    with warnings.catch_warnings():  # equal vectors make fewer clusters: a bad score, no trouble
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        for seed in range(_CLUSTER_RUNS):
            means = sklearn.cluster.KMeans(min(count, 2 * n), n_init=1, random_state=seed)
            clusters = means.fit_predict(both).tolist()
            runs.append([clusters[:n], clusters[n:]])
    return runs


def half_agreement(runs: Iterable[Iterable[Any]]) -> float:
    """What the clusters of anchors say of those of positives, 0 to 1, higher better.

    The information they share over the mean of both entropies, a mean over runs: partners are on
    one topic, so that good vectors put both into one cluster.
    """
    return float(np.mean([sklearn.metrics.v_measure_score(one, other) for one, other in runs]))


def uniformity(vectors: Tensor) -> float:
    """log mean exp(-2 ‖x - y‖²) over different rows of unit length, float (n, d)."""
    if len(vectors) < 2:
        return 0.0
    return float(torch.pdist(vectors).square().mul(-2).exp().mean().log())


def label_measure(vectors: Tensor, labels: Sequence[str]) -> float:
    """V-measure of k-means with as many clusters as labels, 0 to 1, higher better.

    Args:
        vectors: float (n, d).
        labels: n labels.
    """
    count = len(set(labels))
    means = sklearn.cluster.KMeans(count, n_init=5, random_state=0)
    found = means.fit_predict(np.ascontiguousarray(normalize(vectors).cpu().numpy()))
    return float(sklearn.metrics.v_measure_score(labels, found))


_MEASURE_TOKENS = 2048
_MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_HELD_BYTES = {"cpu": 3 << 30, "cuda": 16 << 30}
_SHARE_OF_MEMORY = 0.25
_FEWEST_HELD_TOKENS = 512


class AdapterTrainer:
    """A base model with a LoRA adapter in training, the same on every rank."""

    def __init__(
        self,
        settings: TrainerSettings,
        description: EncoderDescription,
        device: torch.device,
        start: Path | None = None,
        teacher: EncoderDescription | None = None,
    ) -> None:
        """Load the base model of ``description`` and give it a new adapter, or that in ``start``.

        Raises :class:`InputError` for targets that the model does not have, for an adapter of
        another base model, and for a quantized base where the hardware does not allow one.
        ``teacher`` describes the one that the settings name.
        """
        if (settings.teacher is None) != (teacher is None):
            raise ValueError(f"settings name teacher {settings.teacher}, {teacher} is described")
        keep_freed_memory()
        self.settings = settings
        self.description = description
        self.device = device
        self.tokenizer = PromptedTokenizer.load(description)
        base = load_trainable_base(description, device, settings.quantize)
        self._count = len(find_layers(base))
        self._stack = cut_layers(base, description.layers)
        self.model = add_adapter(base, settings, start)
        self._held_tokens = default_held_tokens(base.config.get_text_config(), description, device)
        self.at_once = self._threads(base)
        """Micro-batches that go through the model side by side, where memory allows."""
        self._rows = install_row_dropout(self.model)
        lighten(self.model)
        if settings.gradient_checkpointing:
            enable_checkpointing(self.model, self._stack)
        self.loss = ContrastiveLoss(settings).to(device)
        self.teacher = None if teacher is None else Encoder.load(teacher, device=str(device))
        self.parameters = {
            name: parameter
            for module in (self.model, self.loss)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )

    def step(self, step: int, pairs: pa.Table, offset: int) -> dict[str, float]:
        """Train on one batch; what is to be said about it.

        Args:
            step: counted from 1.
            pairs: this rank's pairs of the batch.
            offset: how many pairs of the batch come before this rank's.

        Returns:
            ``loss`` over the whole batch, ``gradient_norm`` before clipping, ``learning_rate``,
            ``temperature``, and ``tokens`` of this rank. Nothing is changed where the loss or
            the gradient is not finite.
        """
        hard = hard_negatives(pairs)
        negatives = [text for texts in hard or [] for text in texts]
        texts = [*pairs["anchor"].to_pylist(), *pairs["positive"].to_pylist(), *negatives]
        token_ids = self.tokenizer.tokenize(texts)
        counts = None if hard is None else list(map(len, hard))
        seeds = dropout_seeds(self.settings.seed, step, offset, len(pairs), counts)
        keys, taught = pair_keys(pairs, self.device), self._taught(pairs)

        def objective(vectors: Tensor) -> Tensor:
            parts = vectors.split([len(pairs), len(pairs), len(negatives)])
            return self.loss(parts[0], parts[1], keys, None if hard is None else parts[2], taught)

        self.optimizer.zero_grad()
        loss = self._backward(token_ids, seeds, objective)
        parameters = list(self.parameters.values())
        sum_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_gradient_norm)
        measures = {
            "loss": sum_over_ranks(loss),
            "gradient_norm": float(norm),
            "learning_rate": self.learning_rate(step),
            "temperature": float(self.loss.temperature.detach()),
            "tokens": float(sum(map(len, token_ids))),
        }
        if np.isfinite([measures["loss"], measures["gradient_norm"]]).all():
            self.optimizer.param_groups[0]["lr"] = measures["learning_rate"]
            self.optimizer.step()
        return measures

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to a twentieth at the last step."""
        settings = self.settings
        warm = min(1.0, step / max(1, settings.warmup_steps))
        rest = max(1, settings.max_steps - settings.warmup_steps)
        done = max(0, step - settings.warmup_steps) / rest
        return settings.learning_rate * min(warm, 1 - 0.95 * done)

    @torch.no_grad()
    def measure(self, heldout: pa.Table, rank: int, world_size: int) -> dict[str, Any]:
        """Held-out measures, the same on every rank; each embeds its share of the pairs.

        Under :data:`DETAIL` stand the loss, the mean of 1 / the partner's rank and the clusters of
        each pair, by which two measures are compared pair by pair.

        ``heldout_loss`` is the objective of training with all other pairs as negatives, without
        hard ones; ``teacher_agreement``, where there is a teacher, the mean of what
        :func:`~pipelines.training.loss.agreement` gives; the others are those of
        :mod:`pipelines.training.trainer`.
        """
        own = rank_slice(heldout, rank, world_size)
        sides = [self.embed(own[name].to_pylist()) for name in ("anchor", "positive")]
        taught = self._taught(own)
        keys = pair_keys(own, self.device)
        losses = self.loss.per_pair(sides[0], sides[1], keys, taught=taught)
        agreed = None if taught is None else gather_rows(agreement(torch.cat(sides), taught))
        losses, anchors, positives = (gather_rows(rows) for rows in (losses, *sides))
        detail = {
            "heldout_loss": losses.tolist(),
            "mrr": partner_ranks(anchors, positives).reciprocal().mean(dim=0).tolist(),
            "clusters": cluster_sides(anchors, positives),
        }
        measures: dict[str, Any] = {
            "heldout_loss": float(losses.mean()),
            **partner_measures(anchors, positives),
            "half_agreement": half_agreement(detail["clusters"]),
            DETAIL: detail,
        }
        if agreed is not None:
            detail["teacher_agreement"] = agreed.tolist()
            measures["teacher_agreement"] = float(agreed.mean())
        labels = heldout["label"].to_pylist() if "label" in heldout.column_names else []
        known = [place for place, label in enumerate(labels) if label is not None]
        if known and 2 * len(known) >= len(labels):
            measures["v_measure"] = label_measure(anchors[known], [labels[i] for i in known])
        return measures

    def _taught(self, pairs: pa.Table) -> Tensor | None:
        """The teacher's vectors float32 (2n, t) of anchors and positives; None without one."""
        if self.teacher is None:
            return None
        texts = [*pairs["anchor"].to_pylist(), *pairs["positive"].to_pylist()]
        return torch.from_numpy(self.teacher.encode(texts)).to(self.device)

    def _threads(self, base: Any) -> int:
        """Batches that may be in the model side by side: on a CPU one for each of torch's threads.

        Of models that are known, whose passes leave nothing in them that another could meet, and
        without hooks on inner layers.
        """
        apart = can_pack(base) and self.description.layers == (self._count,)
        return torch.get_num_threads() if apart and self.device.type == "cpu" else 1

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Vectors float32 (n, d) of texts with the adapter as it is, without dropout."""
        token_ids = self.tokenizer.tokenize(texts)
        lengths = [len(ids) for ids in token_ids]
        vectors = torch.zeros(len(texts), self.description.dimension, device=self.device)
        budget = even_budget(lengths, _MEASURE_TOKENS, self.at_once) if lengths else 1
        batches = list(token_budget_batches(lengths, budget))

        @torch.no_grad()
        def embed(batch: list[int]) -> Tensor:
            self._rows.set(None)
            return self._vectors([token_ids[index] for index in batch])

        at_once = min(self.at_once, len(batches))
        for batch, rows in zip(batches, side_by_side(embed, batches, at_once), strict=True):
            vectors[batch] = rows
        return vectors

    def _backward(
        self, token_ids: list[list[int]], seeds: list[int], objective: Callable
    ) -> Tensor:
        """Add the objective's gradients, a few texts' activations in memory at a time."""
        lengths = [len(ids) for ids in token_ids]
        held_tokens = self.settings.activation_tokens or self._held_tokens
        micro_tokens = min(held_tokens, _MICRO_BATCH_TOKENS[self.device.type])
        # With checkpointing a repeated forward pass must follow its own batch's seeds.
        alone = self.settings.gradient_checkpointing
        at_once = 1 if alone else min(self.at_once, max(1, held_tokens // (2 * micro_tokens)))
        micro_tokens = even_budget(lengths, micro_tokens, at_once)
        batches = list(token_budget_batches(lengths, micro_tokens))
        held = 0 if alone else count_held(batches, lengths, held_tokens)
        if 0 < held < len(batches):  # the others come on top, and more than one at a time
            held = count_held(batches, lengths, held_tokens - (at_once - 1) * micro_tokens)

        def embed(indices: list[int]) -> Tensor:
            self._rows.set([seeds[index] for index in indices])
            return self._vectors([token_ids[index] for index in indices])

        parameters = list(self.parameters.values())
        return backward_in_parts(embed, batches, objective, parameters, held=held, at_once=at_once)

    def _vectors(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Vectors float32 (n, d) as the encoder makes them, not normalised, with gradients."""
        input_ids, mask = pad_right(token_ids, self.device)
        dtype = getattr(torch, self.description.dtype)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            states = read_states(
                self.model, self._stack, self.description.layers, self._count, input_ids, mask
            )
        return pool(
            states,
            mask,
            self.description.pooling,
            prefix_tokens=self.tokenizer.prefix_tokens,
            suffix_tokens=self.tokenizer.suffix_tokens,
            skipped_tokens=0 if self.description.pool_prompt else self.tokenizer.prompt_tokens,
        )[:, : self.description.dimensions]


def load_trainable_base(
    description: EncoderDescription, device: torch.device, quantize: Quantize = "none"
) -> Any:
    """The base model of a description, frozen, with attention that trains well on ``device``."""
    require_quantization(quantize, device.type)
    folder, dtype = description.fetch()[0].folder, getattr(torch, description.dtype)
    trust = description.trust_remote_code
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "attention": description.attention,
        "trust_remote_code": trust,
    }
    if quantize != "none":
        base = load_quantized_base(folder, quantize, **options)
    else:
        base = load_base_model(folder, **options)
    check_attention(base, description)
    if device.type == "cpu":
        # Backward through torch's fused CPU attention took 54 ms a layer for 20 texts of 45
        # tokens, a quarter of a step; written out as products it takes a tenth of that.
        base.set_attn_implementation("eager")
    return base


def default_held_tokens(
    settings: Any, description: EncoderDescription, device: torch.device
) -> int:
    """Tokens whose activations fit into a set part of memory, which this machine's load is not in.

    Counts what a layer keeps of a token for its backward pass: seven vectors of the model's width,
    four of the gated product's, keys and values, as measured within a fifth for Llama-like models.
    """
    floats = 8 * settings.hidden_size + 4 * inner_width(settings)
    floats *= max(1, *description.layers)
    each = floats * getattr(torch, description.dtype).itemsize
    most = _HELD_BYTES[device.type]
    if device.type == "cuda":
        most = min(
            most, int(_SHARE_OF_MEMORY * torch.cuda.get_device_properties(device).total_memory)
        )
    return max(_FEWEST_HELD_TOKENS, most // each)


def count_held(batches: Sequence[list[int]], lengths: Sequence[int], held_tokens: int) -> int:
    """How many of the last batches fit into memory together, padding counted."""
    total, held = 0, 0
    for batch in reversed(batches):
        total += len(batch) * max(lengths[index] for index in batch)
        if total > held_tokens:
            break
        held += 1
    return held


def dropout_seeds(
    seed: int, step: int, offset: int, pairs: int, negatives: Sequence[int] | None = None
) -> list[int]:
    """A seed for every text of a rank's pairs: all anchors, all positives, all negatives.

    The same text has another seed in every step, and as an anchor another than as a positive,
    which is what makes a text and itself a pair to learn from. ``negatives`` counts those of each
    pair.
    """
    generator = np.random.default_rng([seed, 2, step])
    base = int(generator.integers(1 << 62))
    places = range(offset, offset + pairs)
    rows = [place * 2 + side for side in range(2) for place in places]
    for place, count in zip(places, negatives or [0] * pairs, strict=True):
        rows += [(1 << 40) + (place << 16) + number for number in range(count)]
    return [base ^ row for row in rows]


def hard_negatives(pairs: pa.Table) -> list[list[str]] | None:
    """The hard negatives of each pair, maybe none; None where files have no such column."""
    return pairs["negative"].to_pylist() if "negative" in pairs.column_names else None


def pair_keys(pairs: pa.Table, device: torch.device) -> PairKeys:
    """What marks the equal texts, and pairs of one document or near-duplicates, in a batch."""
    keys = torch.from_numpy(share_keys(pairs)).to(device)
    hard = hard_negatives(pairs)
    if hard is None:
        return PairKeys(keys)
    texts = [text for texts in hard for text in texts]
    negatives = np.concatenate([text_keys(texts), sketch(texts)], axis=1)
    positives = sketch(pairs["positive"].to_pylist())
    return PairKeys(keys, *(torch.from_numpy(part).to(device) for part in (negatives, positives)))
