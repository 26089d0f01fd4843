"""Which pairs are trained on in which step, settled before training starts.

In: Parquet files of pairs. Out: ``batches.parquet``, whose row group s - 1 is the global batch of
step s, and ``heldout.parquet``. A rank reads its own slice of one row group a step. A batch is
therefore a function of seed and step alone: however many workers there are and however often a
run was interrupted, step s sees the same pairs.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import atomic_output, join, open_filesystem, read_table

BATCHES = "batches.parquet"
HELDOUT = "heldout.parquet"
ID_KEY = 2
"""Which of a pair's keys is its document's."""
MORE_KEYS = "more_keys"
"""Column of further keys by which pairs are no negatives of each other."""
_FEWEST_PAIRS = 2
MOST_HELDOUT = 128

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchPlan:
    """How many pairs go where."""

    steps: int
    batch_pairs: int
    heldout_pairs: int
    seed: int


def choose_heldout(pairs: int, enough: int) -> int:
    """How many of some pairs to hold out: all that is useful where there are enough, else a tenth.

    Args:
        pairs: how many there are.
        enough: how many would do for every training step and the most that are held out.
    """
    return MOST_HELDOUT if pairs >= enough else max(2, min(MOST_HELDOUT, pairs // 10))


def write_batches(pairs: pa.Table, plan: BatchPlan, folder: str) -> dict[str, int]:
    """Write ``batches.parquet`` and ``heldout.parquet`` into ``folder``; the counts.

    Pairs are shuffled anew each time they have all been seen. Pairs of one document, and of equal
    texts, are held out together, so that no held-out text is trained on.

    Args:
        pairs: columns ``anchor``, ``positive``, ``id``; optionally ``negative`` and ``label``.
        plan: how many of them go where.
        folder: where to, local or remote.

    Raises:
        InputError: no or too few pairs, or pairs that teach nothing because all are equal.
    """
    check_pairs(pairs, plan)
    heldout, training = split_heldout(pairs, plan)
    added = 0
    if has_few_labels(pairs):
        training, added = add_label_pairs(training, plan.seed)
        heldout = with_more_keys(heldout, label_keys(heldout))
    needed = plan.steps * plan.batch_pairs
    epochs = math.ceil(needed / len(training))
    generator = np.random.default_rng([plan.seed, 1])
    order = np.concatenate([generator.permutation(len(training)) for _ in range(epochs)])[:needed]
    _write(join(folder, BATCHES), training, order, plan.batch_pairs)
    _write(join(folder, HELDOUT), heldout, np.arange(len(heldout)), max(1, len(heldout)))
    return {
        "pairs": len(pairs),
        "training_pairs": len(training),
        "heldout_pairs": len(heldout),
        "epochs": epochs,
    } | ({"label_pairs": added} if added else {})


def has_few_labels(pairs: pa.Table) -> bool:
    """Whether some pairs have a label, but no more than half: labels to learn from.

    Labels of all pairs are for measuring only.
    """
    known = len(pairs) - pairs["label"].null_count if "label" in pairs.column_names else 0
    return 0 < known <= len(pairs) / 2


def add_label_pairs(pairs: pa.Table, seed: int) -> tuple[pa.Table, int]:
    """Training pairs with pairs of two texts of one label, and how many of these.

    Supervised contrastive pairs (Khosla et al. 2020, arXiv:2004.11362), at most half as many as
    there are others. Pairs of one label are no negatives of each other, and a made pair is none of
    whatever either of its two texts is none of.
    """
    left, right = draw_of_one_label(pairs["label"].to_pylist(), len(pairs) // 2, seed)
    keys, labels = share_keys(pairs), label_keys(pairs)
    made, other = pairs.take(left), pairs.take(right)["anchor"]
    made = made.set_column(made.column_names.index("positive"), "positive", other)
    both = pa.concat_tables([pairs, made])
    more = np.concatenate([keys, keys[right]])  # a pair's own ones again, where there is no other
    labels = np.concatenate([labels, labels[left]])
    return with_more_keys(both, np.concatenate([labels, more], axis=1)), len(made)


def label_keys(pairs: pa.Table) -> np.ndarray:
    """int64 (n, 1): a key of each pair's label, or of its document where it has none."""
    columns = (pairs[name].to_pylist() for name in ("label", "id"))
    names = [
        f"id {own}" if label is None else f"label {label}"
        for label, own in zip(*columns, strict=True)
    ]
    return text_keys(names)


def with_more_keys(pairs: pa.Table, keys: np.ndarray) -> pa.Table:
    """Pairs with further keys int64 (n, k), each of them in a row of :data:`MORE_KEYS`."""
    rows = pa.FixedSizeListArray.from_arrays(pa.array(keys.ravel()), keys.shape[1])
    return pairs.append_column(MORE_KEYS, rows)


def draw_of_one_label(
    labels: Sequence[str | None], most: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64 (n,) twice: places of two texts of one label, n ≤ ``most`` such pairs, none twice.

    Drawn from all that there are, without making a list of them: their number is the square of a
    label's texts.
    """
    groups: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        if label is not None:
            groups.setdefault(label, []).append(place)
    groups = {label: group for label, group in groups.items() if len(group) > 1}
    if not groups:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    in_order = np.array([place for group in groups.values() for place in group], np.int64)
    sizes = np.array([len(group) for group in groups.values()], np.int64)
    # how many later texts of its label each text has: one pair each
    later = np.concatenate([np.arange(size - 1, -1, -1) for size in sizes])
    ends = np.cumsum(later)
    drawn = np.random.default_rng([seed, 3]).choice(ends[-1], min(most, ends[-1]), replace=False)
    first = np.searchsorted(ends, drawn, side="right")
    second = first + ends[first] - drawn
    return in_order[first], in_order[second]


def check_pairs(pairs: pa.Table, plan: BatchPlan) -> None:
    """Raise :class:`InputError` for pairs from which nothing can be learned."""
    if len(pairs) < _FEWEST_PAIRS:
        raise InputError(
            f"{len(pairs)} pairs found; at least {_FEWEST_PAIRS} are required, and hundreds to "
            "learn something: each pair's negatives are the other pairs"
        )
    available = max(0, len(pairs) - plan.heldout_pairs)
    if plan.batch_pairs > available:
        raise InputError(
            f"batch_pairs is {plan.batch_pairs}, but only {available} of {len(pairs)} pairs are "
            f"for training ({plan.heldout_pairs} are held out): lower --batch-pairs or "
            "--heldout-pairs, or make more pairs"
        )
    if len(pc.unique(pairs["anchor"])) == 1 and len(pc.unique(pairs["positive"])) == 1:
        raise InputError(
            f"all {len(pairs)} pairs are equal: nothing tells a pair from its negatives"
        )
    if "sketch" in pairs.column_names and len(pc.unique(pc.list_element(pairs["sketch"], 0))) == 1:
        raise InputError(
            f"all {len(pairs)} pairs are of near copies of one text: nothing tells a pair from its "
            "negatives; give different texts"
        )


def split_heldout(pairs: pa.Table, plan: BatchPlan) -> tuple[pa.Table, pa.Table]:
    """Held-out pairs, of two documents at least, and training pairs, by a hash of documents' ids.

    Pairs of one document are no negatives of each other, so one document alone has no loss. Pairs
    with a text in common, and near copies, count as one document whatever their ids, unless that
    would hold out far too many: positives may be the names of some classes.
    """
    keys = share_keys(pairs)
    order, cut, found = order_by_document(pairs, keys, plan)
    most = min(max(2 * plan.heldout_pairs, len(pairs) // 10), len(pairs) - plan.batch_pairs)
    if cut > most:
        by_id = order_by_document(pairs, keys[:, ID_KEY, None], plan)
        if by_id[1] < cut:
            log.warning(
                "%d groups of pairs have texts in common or are near copies, too few to hold some "
                "out: pairs are held out by their ids, and may have texts that are trained on",
                found,
            )
            order, cut, found = by_id
    if len(order) - cut < plan.batch_pairs:
        raise InputError(
            f"too few documents: {found} found, and holding out "
            f"{plan.heldout_pairs} pairs by document, of two documents at least, leaves "
            f"{len(order) - cut} for batches of {plan.batch_pairs}; lower --heldout-pairs or "
            "--batch-pairs, or make pairs of more documents"
        )
    return pairs.take(order[:cut]), pairs.take(order[cut:])


def order_by_document(
    pairs: pa.Table, keys: np.ndarray, plan: BatchPlan
) -> tuple[np.ndarray, int, int]:
    """Pairs with those to hold out first: their order int64 (n,), how many these are, documents.

    ``keys`` int64 (n, k): what shares one is of one document. Documents of more pairs than are
    wanted come last.
    """
    groups = group_rows(keys)
    salt = str(plan.seed).encode() + b"\0"
    ids = (str(value).encode() for value in pairs["id"].to_pylist())
    digests = np.frombuffer(b"".join(hashlib.sha256(salt + i).digest()[:8] for i in ids), "<u8")
    sizes = np.bincount(groups)
    lowest = np.full(len(sizes), np.iinfo(np.uint64).max)
    np.minimum.at(lowest, groups, digests)
    place_of = np.empty(len(sizes), np.int64)
    place_of[np.lexsort((lowest, sizes > plan.heldout_pairs))] = np.arange(len(sizes))
    places = place_of[groups]
    order = np.lexsort((digests, places))
    cut = plan.heldout_pairs
    if 0 < cut < len(order):
        second = int((places == 0).sum())
        last = max(cut - 1, min(second, len(order) - 1))
        cut = int((places <= places[order[last]]).sum())
    return order, cut, len(sizes)


def group_rows(keys: np.ndarray) -> np.ndarray:
    """Int (n,), from 0: rows of keys (n, k) that share one, or are linked by others, are a group.

    Equal texts share all keys of a sketch, near copies nearly always one.
    """
    count = len(keys)
    found, columns = np.unique(keys, return_inverse=True)
    ends = (np.repeat(np.arange(count), keys.shape[1]), count + columns.ravel())
    size = count + len(found)
    links = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(size, size))
    _, groups = connected_components(links, directed=False)
    return np.unique(groups[:count], return_inverse=True)[1]


def read_batch(folder: str, step: int, rank: int, world_size: int) -> pa.Table:
    """The pairs of one rank in a step, counted from 1; the batch is cut as evenly as it goes."""
    filesystem, inner = open_filesystem(join(folder, BATCHES))
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        table = file.read_row_group(step - 1)
    return rank_slice(table, rank, world_size)


def read_heldout(folder: str) -> pa.Table:
    """The held-out pairs."""
    return read_table(join(folder, HELDOUT))


def rank_slice(table: pa.Table, rank: int, world_size: int) -> pa.Table:
    """Rows of one rank: consecutive, and at most one more than any other rank's."""
    start, stop = (len(table) * place // world_size for place in (rank, rank + 1))
    return table.slice(start, stop - start)


def text_keys(*columns: Sequence[str]) -> np.ndarray:
    """int64 (n, k): hashes of n texts in each of k columns, by which equal texts are known."""
    keys = [
        [hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8] for text in column]
        for column in columns
    ]
    rows = b"".join(b"".join(row) for row in zip(*keys, strict=True))
    return np.frombuffer(rows, "<i8").reshape(-1, len(columns))


def share_keys(pairs: pa.Table) -> np.ndarray:
    """int64 (n, k): keys of each pair's texts, document, near copies and, where it counts, label.

    Pairs that share any of them are no negatives of each other.
    """
    columns = [pairs[name].to_pylist() for name in ("anchor", "positive")]
    keys = [text_keys(*columns, [f"id {value}" for value in pairs["id"].to_pylist()])]
    for name, width in (("sketch", SKETCH_KEYS), (MORE_KEYS, None)):
        if name in pairs.column_names:
            # a rank may have no pair at all, so the width must be known without one
            width = width or pairs[name].type.list_size
            rows = np.array(pairs[name].to_pylist(), np.int64)
            keys.append(rows.reshape(len(pairs), width))
    return np.concatenate(keys, axis=1)


SKETCH_KEYS, _BAND_ROWS = 8, 4
_MOST_WORDS = 2000
_SHINGLE = re.compile(r"\w+")


def sketch(texts: Sequence[str]) -> np.ndarray:
    """int64 (n, 8): keys of which near-duplicates share at least one.

    Each key is a band of four MinHashes (Broder 1997) over runs of two words, digits taken as
    equal: texts that have 80% of their runs in common share a key in 98 of 100 cases, with 50% in
    40, with 10% in one of 1,250.
    """
    shape = 2, SKETCH_KEYS * _BAND_ROWS
    factors, terms = np.random.default_rng(7).integers(1, 1 << 64, shape, np.uint64)
    keys = np.empty((len(texts), SKETCH_KEYS), np.int64)
    for row, text in enumerate(texts):
        words = re.sub(r"\d+", "0", text.lower())
        parts = _SHINGLE.findall(words)[:_MOST_WORDS] or [words]
        runs = {" ".join(parts[i : i + 2]) for i in range(max(1, len(parts) - 1))}
        hashes = np.array([zlib.crc32(run.encode("utf-8", "replace")) for run in runs], np.uint64)
        # the high half of a product modulo 2^64: each column is an order of its own
        lowest = ((hashes[:, None] * factors + terms) >> np.uint64(32)).min(axis=0)
        for band, values in enumerate(lowest.reshape(SKETCH_KEYS, _BAND_ROWS)):
            digest = hashlib.blake2b(values.tobytes() + bytes([band]), digest_size=8).digest()
            keys[row, band] = int.from_bytes(digest, "little", signed=True)
    return keys


def _write(path: str, table: pa.Table, order: np.ndarray, group_rows: int) -> None:
    with atomic_output(path) as sink, pq.ParquetWriter(sink, table.schema) as writer:
        for start in range(0, len(order), group_rows):
            rows = table.take(order[start : start + group_rows])
            writer.write_table(rows, row_group_size=group_rows)
