"""One prompt tried: every layer and pooling of it, each turned into clusterings of the sample.

In: texts and a prompt. Out: :class:`Trial`, small enough to be a file: for each candidate some
clusterings and, without labels, how near the two halves of a document are to each other.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.encoder import EncoderDescription
from pipelines.encoding.batching import default_budget_tokens
from pipelines.encoding.described_model import load_described_model
from pipelines.encoding.tokenization import PromptedTokenizer
from pipelines.pooling import Pooling
from pipelines.selecting.criteria import cluster_vectors, partner_log_ranks
from pipelines.selecting.pooled_states import AllLayersPooler

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
    before second ones; ``log_ranks`` float32 (candidates, n), None without halves.
    """

    clusterings: np.ndarray
    log_ranks: np.ndarray | None

    def to_bytes(self) -> bytes:
        """As the content of a file."""
        sink = io.BytesIO()
        arrays: dict[str, Any] = {"clusterings": self.clusterings}
        if self.log_ranks is not None:
            arrays["log_ranks"] = self.log_ranks
        np.savez_compressed(sink, **arrays)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Trial:
        """Undo :meth:`to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return cls(arrays["clusterings"], arrays.get("log_ranks"))


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
        encoder = EncoderDescription.from_json(description)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_described_model(encoder, self.device)
        settings = self.model.config.get_text_config()
        self.budget_tokens = default_budget_tokens(settings, self.device)


def try_prompt(
    loaded: LoadedModel, tokenizer: PromptedTokenizer, texts: Sequence[str], plan: TrialPlan
) -> Trial:
    """Run a prompt's texts through the model once and cluster what every candidate makes of them.

    Args:
        loaded: the model.
        tokenizer: that of the prompt.
        texts: documents; with halves each of at least two tokens.
        plan: what to try.
    """
    pooler = AllLayersPooler(loaded.model, plan.layers, plan.poolings, loaded.budget_tokens)
    token_ids = tokenizer.tokenize(texts)
    if plan.halves:
        halves = [cut_in_half(tokenizer, ids) for ids in token_ids]
        token_ids = [first for first, _ in halves] + [second for _, second in halves]
    states = pooler.pool(token_ids, tokenizer)
    clusterings, ranks = [], []
    for layer, pooling in plan.candidates:
        vectors = states.vectors(layer, pooling, normalize=plan.normalize)
        runs = [cluster_vectors(vectors, clusters, seed) for clusters, seed in plan.runs]
        clusterings.append(np.stack(runs))
        if plan.halves:
            ranks.append(partner_log_ranks(vectors[: len(texts)], vectors[len(texts) :]))
    return Trial(np.stack(clusterings), np.stack(ranks) if plan.halves else None)


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
