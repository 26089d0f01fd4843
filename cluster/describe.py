"""What a cluster is about: keywords and documents that stand for it, in any language."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import regex
from scipy.sparse import csr_array

from cluster.assign import split_by
from cluster.census import Census
from cluster.sample import Sample

# Words are letters with their marks, and digits after a letter. Scripts written without spaces are
# cut into pairs of characters; Katakana marks its own words by the change of script.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_RUN = regex.compile(
    rf"(?P<pairs>[{_UNSPACED}][{_UNSPACED}\p{{M}}]*)|(?P<kana>[\p{{Katakana}}ー]+)"
    rf"|(?P<word>[\p{{L}}--[{_UNSPACED}\p{{Katakana}}]]"
    rf"[[\p{{L}}\p{{M}}\p{{N}}'’]--[{_UNSPACED}\p{{Katakana}}]]*)",
    regex.VERSION1,
)
_CHARACTER = regex.compile(r"\X")
_LONGEST_WORD = 40
_COMMON_SHARE = 0.02
_SPREAD_SHARE = 0.14


@dataclass(frozen=True)
class Example:
    """A document that stands for a cluster."""

    id: Any
    distance: float
    """To the centroid."""
    text: str | None
    label: str | None


@dataclass(frozen=True)
class Description:
    """One cluster, for people."""

    cluster_id: int
    size: int
    share: float
    """Of the documents that are in clusters."""
    keywords: list[str]
    central: list[Example]
    """The documents nearest to the centroid, of all documents."""
    diverse: list[Example]
    """Documents that show its breadth, of the sample."""
    mean_distance: float | None
    """Of its documents to the centroid; None where it has none."""
    top_label: str | None
    """Its most frequent label."""
    top_label_share: float | None
    """Share of its labelled documents that have that label."""
    name: str | None = None
    """What an LLM calls it, where one was asked."""


def describe_clusters(
    census: Census, sample: Sample, cluster_ids: np.ndarray, distances: np.ndarray
) -> list[Description]:
    """A description of every cluster.

    ``cluster_ids``, int (n,), and ``distances``, float (n,), to the centroids are those of the
    documents of ``sample``; sizes, labels and central documents are those of all documents.
    """
    k, total = len(census.sizes), max(1, int(census.sizes.sum()))  # 0 where all are noise
    means = census.mean_distances()
    keywords: list[list[str]] = [[] for _ in range(k)]
    if sample.texts is not None:
        keywords = find_keywords([text or "" for text in sample.texts.to_pylist()], cluster_ids, k)
    central = _examples_by_cluster(census.nearest, k)
    members = split_by(np.arange(len(cluster_ids)), cluster_ids, k)
    tops = top_labels(census)
    descriptions = []
    for cluster in range(k):
        size = int(census.sizes[cluster])
        rows = members[cluster]
        picked = rows[pick_diverse(sample.vectors[rows], distances[rows], 4)]
        descriptions.append(
            Description(
                cluster,
                size,
                size / total,
                keywords[cluster],
                central[cluster],
                [_sampled_example(sample, int(row), distances) for row in picked],
                float(means[cluster]) if size else None,
                *tops[cluster],
            )
        )
    return descriptions


def top_labels(census: Census) -> list[tuple[str, float] | tuple[None, None]]:
    """Of every cluster the most frequent label and its share of the labelled documents there."""
    labels, k = list(census.labels), len(census.sizes)
    counts = np.array([census.labels[label] for label in labels]).reshape(len(labels), k)
    return [
        (labels[row.argmax()], float(row.max() / row.sum())) if row.sum() else (None, None)
        for row in counts.T
    ]


def split_words(text: str) -> Iterator[str]:
    """Words in lower case: runs of letters, or pairs of characters in scripts without spaces."""
    for match in _RUN.finditer(unicodedata.normalize("NFKC", text).lower()):
        if match.lastgroup == "pairs":
            characters = _CHARACTER.findall(match.group())
            yield from (first + second for first, second in pairwise(characters))
        else:
            word = match.group().strip("'’")
            # Longer ones are addresses or encoded data.
            if 1 < len(word) <= _LONGEST_WORD:
                yield word


def find_keywords(
    texts: Sequence[str], cluster_ids: np.ndarray, k: int, *, count: int = 8
) -> list[list[str]]:
    """Up to ``count`` words that set each of ``k`` clusters apart, strongest first.

    Class-based TF-IDF (Grootendorst 2022, arXiv:2203.05794): a cluster is one long document.
    Words that many documents use in every cluster alike are stop words of this corpus, learned
    from it. ``cluster_ids``, int (n,), are those of ``texts``.
    """
    rarest = 1 if len(texts) < 200 else 3
    from sklearn.feature_extraction.text import CountVectorizer  # slow to load

    vectorizer = CountVectorizer(analyzer=lambda text: list(split_words(text)), min_df=rarest)
    try:
        used = csr_array(vectorizer.fit_transform(texts))
    except ValueError:  # scikit-learn: no word is left, as with texts of digits alone
        return [[] for _ in range(k)]
    words = vectorizer.get_feature_names_out()
    members = csr_array(
        (np.ones(len(texts)), (cluster_ids, np.arange(len(texts)))), shape=(k, len(texts))
    )
    counts = members @ used
    weights = _class_tf_idf(counts)
    if k > 1:
        documents = members @ (used > 0).astype(np.float64)
        stop = _stop_words(documents, np.bincount(cluster_ids, minlength=k))
        weights = csr_array(weights.multiply(~stop[None, :]))
    weights.eliminate_zeros()
    return [_strongest(weights, cluster, words, count) for cluster in range(k)]


def _class_tf_idf(counts: csr_array) -> csr_array:
    """float64 (k, words): share of the cluster's words times log(1 + mean length / frequency)."""
    lengths = counts.sum(axis=1)
    rarity = np.log1p(lengths.mean() / np.maximum(counts.sum(axis=0), 1))
    return csr_array(counts.multiply(1 / np.maximum(lengths, 1)[:, None]).multiply(rarity[None, :]))


def _stop_words(documents: csr_array, sizes: np.ndarray) -> np.ndarray:
    """bool (words,): common words whose spread over clusters hardly differs from the documents'.

    The difference is the Kullback-Leibler divergence in bits of a word's clusters from everyone's,
    compared with the most bits there are: the entropy of the cluster sizes. On 20 Newsgroups in 20
    clusters "the" differs by 0.00 bits, "he" by 0.43, "space" by 0.69, "windows" by 2.04 of 4.2.
    """
    frequency = documents.sum(axis=0)
    everyone = sizes / sizes.sum()
    pairs = documents.tocoo()
    share = pairs.data / frequency[pairs.col]
    bits = share * np.log2(share / everyone[pairs.row])
    divergence = np.bincount(pairs.col, weights=bits, minlength=len(frequency))
    most = -np.sum(everyone[everyone > 0] * np.log2(everyone[everyone > 0]))
    return (frequency > _COMMON_SHARE * sizes.sum()) & (divergence < _SPREAD_SHARE * most)


def _strongest(weights: csr_array, cluster: int, words: np.ndarray, count: int) -> list[str]:
    inside = slice(weights.indptr[cluster], weights.indptr[cluster + 1])
    present = weights.indices[inside]
    order = np.lexsort((words[present], -weights.data[inside]))
    return [str(words[i]) for i in present[order[:count]]]


def pick_diverse(vectors: np.ndarray, distances: np.ndarray, count: int) -> list[int]:
    """Rows that show a cluster's breadth: each the farthest from those already picked.

    ``vectors``, float32 (n, d), and ``distances``, float (n,), to the centroid are one cluster's;
    the outer quarter is left out, since the farthest documents are often strays. Starts from the
    most central row. Gonzalez's farthest-first traversal (1985).
    """
    if not len(vectors):
        return []
    inner = np.flatnonzero(distances <= np.quantile(distances, 0.75))
    picked = [int(inner[np.argmin(distances[inner])])]
    gaps = np.full(len(inner), np.inf)
    while len(picked) < min(count, len(inner)):
        difference = vectors[inner] - vectors[picked[-1]]
        gaps = np.minimum(gaps, np.einsum("ij,ij->i", difference, difference))
        picked.append(int(inner[np.argmax(gaps)]))
    return picked


def _examples_by_cluster(documents: pa.Table | None, k: int) -> list[list[Example]]:
    examples: list[list[Example]] = [[] for _ in range(k)]
    for row in documents.to_pylist() if documents is not None else ():
        example = Example(row["id"], row["distance"], row.get("text"), row.get("label"))
        examples[row["cluster_id"]].append(example)
    return examples


def _sampled_example(sample: Sample, row: int, distances: np.ndarray) -> Example:
    text = sample.texts[row].as_py() if sample.texts is not None else None
    label = sample.labels[row].as_py() if sample.labels is not None else None
    return Example(sample.ids[row].as_py(), float(distances[row]), text, label)
