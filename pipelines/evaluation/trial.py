"""One prompt tried: every layer and pooling of it, each turned into clusterings of the sample.

In: texts and a prompt. Out: :class:`Trial`, small enough to be a file: for each candidate some
clusterings and, without labels, how near the two halves of a document are to each other.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pipelines.encoder.decoder import load_described_model, vector_head
from pipelines.encoder.description import EncoderDescription, Pooling
from pipelines.encoder.encoder import (
    default_budget_tokens,
    is_out_of_memory,
    token_budget_batches,
)
from pipelines.encoder.padded import find_layers, pad_right, record_outputs
from pipelines.encoder.pooling import VectorHead, pool, token_weights
from pipelines.encoder.sources import fetch_model
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.encoder.usage import read_usage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PooledStates:
    """Pooled, not normalised, vectors of some texts.

    ``parts`` holds float32 (n, d) for each layer (0 the token embeddings, the last with the final
    norm) and each pooling that is no combination of others, by :func:`part_name`.
    """

    parts: dict[tuple[int, str], np.ndarray]

    def vectors(
        self,
        layer: int,
        pooling: Pooling,
        *,
        normalize: bool = True,
        head: VectorHead | None = None,
    ) -> np.ndarray:
        """What an encoder of this layer and pooling gives: float32 (n, d), or (n, 2d).

        With a ``head``, which says itself whether it normalises, as long as that makes them.
        """
        skipped = 0 if head is None else head.skipped_tokens
        names = [part_name(part, skipped) for part in pooling.split("+")]
        joined = np.concatenate([self.parts[layer, name] for name in names], axis=1)
        if head is not None:
            return head.after_pooling(torch.from_numpy(joined)).numpy()
        if normalize:
            lengths = np.linalg.norm(joined, axis=1, keepdims=True)
            joined = joined / np.maximum(lengths, 1e-12)
        return joined


def part_name(part: str, skipped_tokens: int) -> str:
    """What a pooling that leaves out the first tokens of a text is called beside one of all."""
    return f"{part} after {skipped_tokens}" if skipped_tokens else part


class AllLayersPooler:
    """A base model that is run once for many layers and poolings."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        poolings: Sequence[Pooling],
        budget_tokens: int,
        heads: Mapping[Pooling, VectorHead] | None = None,
    ) -> None:
        """Prepare ``model``, as :func:`pipelines.encoder.base_model.load_base_model` gives it.

        Args:
            model: a base model whose layers have not been cut.
            layers: which states are wanted, from 0 for the token embeddings.
            poolings: which poolings are wanted.
            budget_tokens: tokens of a batch, padding included.
            heads: by pooling, which of a text's first tokens it leaves out; none by default.
        """
        self._model = model
        self._stack = find_layers(model)
        self._layers = tuple(layers)
        skipped = {way: head.skipped_tokens for way, head in (heads or {}).items()}
        ways = dict.fromkeys((part, skipped.get(w, 0)) for w in poolings for part in w.split("+"))
        self._sums = [way for way in ways if way[0] != "max"]
        self._largest = [way for way in ways if way[0] == "max"]
        self._device = next(model.parameters()).device
        self._budget_tokens = budget_tokens

    def pool(
        self, token_ids: Sequence[Sequence[int]], tokenizer: PromptedTokenizer
    ) -> PooledStates:
        """The pooled states of texts, in the order given.

        Args:
            token_ids: texts within the prompt of ``tokenizer``, each of at least one token.
            tokenizer: says which of a text's tokens are its prompt's.
        """
        batches = deque(token_budget_batches([len(ids) for ids in token_ids], self._budget_tokens))
        names = [part_name(*way) for way in (*self._sums, *self._largest)]
        parts: dict[tuple[int, str], np.ndarray] = {}
        while batches:
            batch = batches.popleft()
            try:
                pooled = self._pool_batch([token_ids[index] for index in batch], tokenizer)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                pooled = None
            if pooled is None:  # outside the handler, which keeps the failed batch's memory alive
                half = len(batch) // 2
                log.warning("out of memory: %d texts are run in two halves", len(batch))
                batches.extendleft([batch[half:], batch[:half]])
                continue
            for layer, vectors in pooled.items():
                for place, name in enumerate(names):
                    if (layer, name) not in parts:  # the last layer may have a width of its own
                        shape = len(token_ids), vectors.shape[-1]
                        parts[layer, name] = np.empty(shape, np.float32)
                    parts[layer, name][batch] = vectors[:, place].cpu().numpy()
        return PooledStates(parts)

    @torch.inference_mode()
    def _pool_batch(
        self, token_ids: Sequence[Sequence[int]], tokenizer: PromptedTokenizer
    ) -> dict[int, Tensor]:
        """Vectors float32 (n, poolings, d) of each layer."""
        input_ids, mask = pad_right(token_ids, self._device)
        around = (tokenizer.prefix_tokens, tokenizer.suffix_tokens)
        weights = [token_weights(mask, name, *around, skipped) for name, skipped in self._sums]

        def pool_layer(states: Tensor) -> Tensor:
            # one product for all: pool() would turn the states to float32 once a pooling
            columns = []
            if weights:
                kept = states.float().masked_fill(~mask[..., None], 0.0)
                columns.append(torch.bmm(torch.stack(weights, dim=1), kept))
            for name, skipped in self._largest:
                columns.append(pool(states, mask, name, skipped_tokens=skipped)[:, None])
            return torch.cat(columns, dim=1)

        count = len(self._stack)
        inner = [layer for layer in self._layers if layer < count]
        with record_outputs(self._stack, inner, pool_layer) as recorded:
            output = self._model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)
        if count in self._layers:
            recorded[count] = pool_layer(output.last_hidden_state)
        return recorded


FEWEST_HALF_TOKENS = 4
_CLUSTERS_WITHOUT_LABELS = (8, 16, 32)
_LABELLED_RUNS = 3
_UNLABELLED_RUNS = 2
_LEAST_DOCUMENTS_A_CLUSTER = 4


@dataclass(frozen=True)
class TrialPlan:
    """What every prompt is tried with.

    ``runs`` are numbers of clusters with a seed each. With ``halves`` a document is two texts,
    the halves of its tokens.
    """

    layers: tuple[int, ...]
    poolings: tuple[Pooling, ...]
    runs: tuple[tuple[int, int], ...]
    halves: bool
    normalize: bool

    @property
    def candidates(self) -> list[tuple[int, Pooling]]:
        """Layer and pooling of every candidate, in the order of a trial's arrays."""
        return [(layer, pooling) for layer in self.layers for pooling in self.poolings]


@dataclass(frozen=True)
class Trial:
    """What one prompt gave.

    ``clusterings`` int16 (candidates, runs, n), or (candidates, runs, 2n) with first halves
    before second ones; ``log_ranks`` float32 (candidates, n), None without halves; ``dimensions``
    int (candidates,), the lengths of the vectors.
    """

    clusterings: np.ndarray
    log_ranks: np.ndarray | None = None
    dimensions: np.ndarray | None = None

    def to_bytes(self) -> bytes:
        """As the content of a file."""
        sink = io.BytesIO()
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        np.savez_compressed(sink, **arrays)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Trial:
        """Undo :meth:`to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return cls(**arrays)


def plan_runs(
    documents: int, *, num_clusters: int, labels: int | None, seed: int
) -> tuple[tuple[int, int], ...]:
    """Numbers of clusters to score with, each with the seed of its k-means.

    With labels as many clusters as there are labels; without, several numbers, as none is known.
    """
    count = _UNLABELLED_RUNS if labels is None else _LABELLED_RUNS
    numbers = (num_clusters or labels,) if labels or num_clusters else _CLUSTERS_WITHOUT_LABELS
    most = max(2, documents // _LEAST_DOCUMENTS_A_CLUSTER)
    different = dict.fromkeys(min(number or 2, most) for number in numbers)
    return tuple((number, seed + run) for number in different for run in range(count))


class LoadedModel:
    """A base model, adapter merged, that is run for one prompt after another."""

    def __init__(self, description: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._adapter: str | None = None
        self.model: Any = None
        self.take(EncoderDescription.from_json(description))

    def take(self, encoder: EncoderDescription) -> None:
        """Have the weights of this encoder loaded, whatever its prompt."""
        if self.model is not None and encoder.adapter_revision == self._adapter:
            return
        self.model = None  # before the next one's weights come
        self.model = load_described_model(encoder, self.device)
        self._adapter = encoder.adapter_revision
        settings = self.model.config.get_text_config()
        self.budget_tokens = default_budget_tokens(settings, self.device)


def try_prompt(
    loaded: LoadedModel,
    tokenizer: PromptedTokenizer,
    texts: Sequence[str],
    plan: TrialPlan,
    encoder: EncoderDescription | None = None,
) -> Trial:
    """Run a prompt's texts through the model once and cluster what every candidate makes of them.

    Args:
        loaded: the model.
        tokenizer: that of the prompt.
        texts: documents; with halves each of at least two tokens.
        plan: what to try.
        encoder: the encoder with the prompt, whose own head each candidate has; None for none.
    """
    heads = (
        {} if encoder is None else {way: head_of(encoder, tokenizer, way) for way in plan.poolings}
    )
    pooler = AllLayersPooler(loaded.model, plan.layers, plan.poolings, loaded.budget_tokens, heads)
    token_ids = tokenizer.tokenize(texts)
    if plan.halves:
        halves = [cut_in_half(tokenizer, ids) for ids in token_ids]
        token_ids = [first for first, _ in halves] + [second for _, second in halves]
    states = pooler.pool(token_ids, tokenizer)
    clusterings, ranks, dimensions = [], [], []
    for layer, pooling in plan.candidates:
        head = heads.get(pooling)
        vectors = states.vectors(layer, pooling, normalize=plan.normalize, head=head)
        dimensions.append(vectors.shape[1])
        runs = [cluster_vectors(vectors, clusters, seed) for clusters, seed in plan.runs]
        clusterings.append(np.stack(runs))
        if plan.halves:
            ranks.append(partner_log_ranks(vectors[: len(texts)], vectors[len(texts) :]))
    return Trial(
        np.stack(clusterings), np.stack(ranks) if plan.halves else None, np.array(dimensions)
    )


def head_of(
    encoder: EncoderDescription, tokenizer: PromptedTokenizer, pooling: Pooling
) -> VectorHead:
    """What an encoder would have after its layers with another pooling, on the CPU.

    A model's folder may leave the prompt out of its own pooling and project what that gives; other
    poolings have neither. How many numbers it keeps holds for all.
    """
    usage = read_usage(fetch_model(encoder.model, encoder.commit).folder, encoder.model)
    if usage is not None:
        own = pooling == usage.pooling
        encoder = replace(
            encoder,
            pool_prompt=not own or usage.pool_prompt,
            projections=usage.projections if own else (),
        )
    return vector_head(replace(encoder, pooling=pooling), tokenizer, torch.device("cpu"))


def cut_in_half(
    tokenizer: PromptedTokenizer, token_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Both halves of a prompted text's body, each within the prompt."""
    stop = len(token_ids) - tokenizer.suffix_tokens
    head, body, tail = (
        list(token_ids[: tokenizer.prefix_tokens]),
        list(token_ids[tokenizer.prefix_tokens : stop]),
        list(token_ids[stop:]),
    )
    middle = len(body) // 2
    return [*head, *body[:middle], *tail], [*head, *body[middle:], *tail]


def body_tokens(tokenizer: PromptedTokenizer, token_ids: Sequence[int]) -> int:
    """Tokens of a prompted text that are its own."""
    return len(token_ids) - tokenizer.prefix_tokens - tokenizer.suffix_tokens


_ITERATIONS = 30


def cluster_vectors(vectors: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Clusters int16 (n,) of vectors float32 (n, d), by one run of k-means."""
    means = KMeans(num_clusters, n_init=1, max_iter=_ITERATIONS, random_state=seed)
    with warnings.catch_warnings():  # equal vectors make fewer clusters: a bad score, no trouble
        warnings.simplefilter("ignore", ConvergenceWarning)
        return means.fit_predict(vectors).astype(np.int16)


def partner_log_ranks(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far down each row's partner is among its neighbours in the other array.

    Args:
        first: float32 (n, d), one half of each document.
        second: float32 (n, d), the other half, in the same order.

    Returns:
        float32 (n,): the logarithm of the rank of the partner by cosine, a mean over both
        directions; 0 where a half's nearest neighbour is its partner. Among equals the partner is
        in the middle.
    """
    one, other = (_centred(vectors) for vectors in (first, second))
    cosines = one @ other.T
    own = np.diagonal(cosines)
    forward, backward = (
        0.5 + (cosines > bound).sum(axis=axis) + 0.5 * (cosines == bound).sum(axis=axis)
        for bound, axis in ((own[:, None], 1), (own[None, :], 0))
    )
    return ((np.log(forward) + np.log(backward)) / 2).astype(np.float32)


def agreement(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Information that clusterings share with their counterparts.

    Args:
        first: int (a, n), clusters or labels numbered from 0.
        second: int (a, n).
        weights: float (n,), how often each document counts.

    Returns:
        float64 (a,), from 0 to 1: information shared over the mean of both entropies, which for
        labels and clusters is the V-measure. 0 where one of them has all in one cluster.
    """
    count, documents = first.shape
    wide, high = int(first.max()) + 1, int(second.max()) + 1
    cells = (np.arange(count)[:, None] * wide + first.astype(np.int64)) * high + second
    joint = np.bincount(
        cells.ravel(),
        weights=np.broadcast_to(weights / weights.sum(), (count, documents)).ravel(),
        minlength=count * wide * high,
    ).reshape(count, wide, high)
    left, right = (_entropy(joint.sum(axis=axis)) for axis in (2, 1))
    shared = np.maximum(left + right - _entropy(joint.reshape(count, -1)), 0.0)
    known = (left > 1e-12) & (right > 1e-12)
    return np.where(known, 2 * shared / np.maximum(left + right, 1e-12), 0.0)


def _entropy(shares: np.ndarray) -> np.ndarray:
    logarithms = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logarithms).sum(axis=-1)


def _centred(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1 after what is common to all has been taken away."""
    apart = vectors - vectors.mean(axis=0)
    return apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-12)
