"""What kept columns say of the clusters: counts and sums by cluster, and topics over time.

Enters: ``map.parquet``, streamed, so that memory does not grow with the documents. Leaves: figures
of all documents, the same bits whatever the batch, and the values of a few documents for the page.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.document_map import map_batches
from cluster.vectors import shorten_texts
from pipelines.runtime.files import open_filesystem

MOST_VALUES = 1_000
"""Different values of a column that are counted; one with more is text or ids."""
_LONGEST = 100_000
_OWN = ("id", "x", "y", "cluster_id")
_SHIFT = 2_048
_HALF = 27
_ISO_TIME = r"\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2})?"
_ISO = rf"^\d{{4}}-\d{{2}}-\d{{2}}([T ]{_ISO_TIME})?$"
_ZONE = r":\d{2}(\.\d+)?(Z|[+-]\d{2}:?\d{2})$"

Kind = Literal["category", "number", "date"]
Unit = Literal["hour", "day", "week", "month", "quarter", "year", "decade"]
_UNITS: dict[Unit, tuple[Literal["h", "D", "M"], int, int, float]] = {
    "hour": ("h", 1, 0, 1 / 24),
    "day": ("D", 1, 0, 1),
    "week": ("D", 7, 3, 7),  # 1970-01-01 was a Thursday
    "month": ("M", 1, 0, 30.44),
    "quarter": ("M", 3, 0, 91.3),
    "year": ("M", 12, 0, 365.2),
    "decade": ("M", 120, 0, 3_652),
}
"""What numpy counts in, how many of it make one, how many are before the first, and days."""
_MOST_BINS = 60


@dataclass(frozen=True)
class Numbers:
    """A column of numbers, by cluster id; values that are not finite are left out as nulls are."""

    documents: Mapping[int, int]
    """With a value."""
    sums: Mapping[int, Fraction]
    """Exact, of the values as float64."""

    def sum_of(self, cluster: int) -> float:
        """The sum, rounded once; infinite beyond the range of float64."""
        return _rounded(self.sums.get(cluster, Fraction(0)))

    def mean_of(self, cluster: int) -> float | None:
        """None where no document has a value."""
        count = self.documents.get(cluster, 0)
        return _rounded(self.sums[cluster] / count) if count else None


@dataclass(frozen=True)
class Times:
    """A column of dates, counted in bins."""

    unit: Unit
    counts: Mapping[tuple[int, int], int]
    """(cluster id, number of the bin) -> documents."""
    window: range
    """Numbers of the bins that hold the middle 98% of the sample's documents; at most 60."""

    def start_of(self, number: int) -> np.datetime64:
        """When a bin begins, datetime64[us], in UTC where the column has a zone."""
        base, step, shift, _ = _UNITS[self.unit]
        return np.datetime64(number * step - shift, base).astype("datetime64[us]")


@dataclass(frozen=True)
class KeptColumn:
    """One kept column of all documents."""

    name: str
    kind: Kind
    sample: np.ndarray
    """Values of the documents that the page shows: objects (str or None), float64 with NaN, or
    datetime64[us] with NaT."""
    counts: Mapping[tuple[int, str | None], int] = field(default_factory=dict)
    """Of a category, (cluster id, value) -> documents; nothing where it has too many values."""
    numbers: Numbers | None = None
    times: Times | None = None


def read_kept_columns(path: str, ids: pa.Array) -> list[KeptColumn]:
    """The columns of ``map.parquet`` beside its own, with the values of the documents ``ids``.

    Strings are dates where all of them are so by ISO 8601, else categories, as truth values are.
    Lists, structs, bytes and times of day are passed over.
    """
    filesystem, inner = open_filesystem(path)
    with filesystem.open_input_file(inner) as source:
        schema = pq.ParquetFile(source).schema_arrow
    ids = ids.cast(schema.field("id").type)
    readers = [
        make(kept.name, len(ids))
        for kept in schema
        if kept.name not in _OWN and (make := _reader_of(kept.type)) is not None
    ]
    if not readers:
        return []
    for batch in map_batches(path, ["id", "cluster_id", *(reader.name for reader in readers)]):
        places = pc.index_in(batch.column("id"), value_set=ids)
        rows = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
        shown = places.drop_null().to_numpy()
        clusters = batch.column("cluster_id").to_numpy()
        for reader in readers:
            reader.add(batch.column(reader.name), clusters, rows, shown)
    columns = [reader.column() for reader in readers]
    dates = [column for column in columns if column.kind == "date"]
    counted = _count_times(path, {column.name: _unit_of(column.sample) for column in dates})
    return [
        KeptColumn(c.name, c.kind, c.sample, times=_times_of(c.sample, *counted[c.name]))
        if c.kind == "date"
        else c
        for c in columns
    ]


class _Categories:
    """Counts values, until there are too many, and sees whether all are dates."""

    def __init__(self, name: str, shown: int) -> None:
        self.name = name
        self._sample = np.full(shown, None, dtype=object)
        self._counts: Counter[tuple[int, str | None]] | None = Counter()
        self._values: set[str | None] = set()
        self._dates: bool | None = None

    def add(
        self, values: pa.Array, clusters: np.ndarray, rows: np.ndarray, shown: np.ndarray
    ) -> None:
        values = _readable(values.cast(pa.large_string()))
        self._sample[shown] = values.take(pa.array(rows)).to_pylist()
        if self._dates is not False:
            times = to_times(values)
            if times is None:
                self._dates = False
            elif not np.isnat(times).all():
                self._dates = True
        if self._counts is None:
            return
        encoded = values.dictionary_encode()
        if len(encoded.dictionary) <= MOST_VALUES:
            names = [*encoded.dictionary.to_pylist(), None]
            self._values.update(names[:-1])
        if max(len(encoded.dictionary), len(self._values)) > MOST_VALUES:
            self._counts = None
            self._values.clear()
            return
        codes = encoded.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)
        for (cluster, code), count in _count_pairs(clusters, codes):
            self._counts[cluster, names[code]] += count

    def column(self) -> KeptColumn:
        if self._dates:
            times = to_times(pa.array(self._sample, pa.large_string()))
            assert times is not None
            return KeptColumn(self.name, "date", times)
        return KeptColumn(self.name, "category", self._sample, self._counts or {})


class _Numbers:
    """Adds up numbers, exactly."""

    def __init__(self, name: str, shown: int) -> None:
        self.name = name
        self._sample = np.full(shown, np.nan)
        self._documents: Counter[int] = Counter()
        self._sums: defaultdict[int, int] = defaultdict(int)

    def add(
        self, values: pa.Array, clusters: np.ndarray, rows: np.ndarray, shown: np.ndarray
    ) -> None:
        numbers = values.cast(pa.float64(), safe=False).fill_null(math.nan)
        numbers = numbers.to_numpy(zero_copy_only=False)
        self._sample[shown] = numbers[rows]
        finite = np.isfinite(numbers)
        numbers, clusters = numbers[finite], clusters[finite].astype(np.int64)
        self._documents.update(dict(zip(*_as_lists(clusters), strict=True)))
        # A number is 53 bits times a power of 2: those of one power add up as integers.
        fractions, powers = np.frexp(numbers)
        whole = np.ldexp(fractions, 53).astype(np.int64)
        keys, which = np.unique(clusters * (2 * _SHIFT) + powers + _SHIFT, return_inverse=True)
        for part, bits in ((whole >> _HALF, _HALF), (whole & ((1 << _HALF) - 1), 0)):
            sums = np.zeros(len(keys), dtype=np.int64)
            np.add.at(sums, which, part)
            for key, total in zip(keys.tolist(), sums.tolist(), strict=True):
                self._sums[key] += total << bits

    def column(self) -> KeptColumn:
        sums: defaultdict[int, Fraction] = defaultdict(Fraction)
        for key, total in self._sums.items():
            cluster, power = divmod(key, 2 * _SHIFT)
            sums[cluster] += total * Fraction(2) ** (power - _SHIFT - 53)
        return KeptColumn(
            self.name, "number", self._sample, numbers=Numbers(dict(self._documents), dict(sums))
        )


class _Dates:
    """Remembers the sample's dates; they decide how dates are counted."""

    def __init__(self, name: str, shown: int) -> None:
        self.name = name
        self._sample = np.full(shown, np.datetime64("NaT"), dtype="datetime64[us]")

    def add(
        self, values: pa.Array, clusters: np.ndarray, rows: np.ndarray, shown: np.ndarray
    ) -> None:
        times = to_times(values.take(pa.array(rows)))
        assert times is not None
        self._sample[shown] = times

    def column(self) -> KeptColumn:
        return KeptColumn(self.name, "date", self._sample)


def _readable(values: pa.Array) -> pa.Array:
    """The same with replacement characters for bytes that are no UTF-8, which files may hold."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        return shorten_texts(values, _LONGEST).cast(pa.large_string())
    return values


def _reader_of(kind: pa.DataType) -> type[_Categories | _Numbers | _Dates] | None:
    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind):
        return _Categories
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return _Numbers
    if types.is_date(kind) or types.is_timestamp(kind):
        return _Dates
    return None


def to_times(values: pa.Array) -> np.ndarray | None:
    """datetime64[us] (n,) in UTC, NaT for null and for an empty string.

    None where a string is no date by ISO 8601.
    """
    if pa.types.is_large_string(values.type) or pa.types.is_string(values.type):
        values = pc.replace_with_mask(
            values, pc.fill_null(pc.equal(values, ""), False), pa.scalar(None, values.type)
        )
        if pc.any(pc.invert(pc.match_substring_regex(values, _ISO))).as_py():
            return None
        values = pc.replace_substring_regex(values, r"(\.\d{1,6})\d*", r"\1")
        zoned = pc.match_substring_regex(values, _ZONE)
        nothing = pa.scalar(None, values.type)
        try:
            parts = [
                pc.if_else(zoned, values, nothing).cast(pa.timestamp("us", "UTC")),
                pc.if_else(zoned, nothing, values).cast(pa.timestamp("us")),
            ]
        except pa.ArrowInvalid:  # such as the 30th of February
            return None
        values = pc.coalesce(*(part.cast(pa.timestamp("us")) for part in parts))
    elif pa.types.is_timestamp(values.type) and values.type.tz is not None:
        values = values.cast(pa.timestamp(values.type.unit, "UTC"))
    naive = values.cast(pa.timestamp("us"), safe=False)
    return naive.to_numpy(zero_copy_only=False).astype("datetime64[us]")


def _unit_of(sample: np.ndarray) -> Unit:
    """The finest unit of which 60 hold the middle 98% of the sample's dates."""
    times = _middle(sample)
    if not len(times):
        return "day"
    days = float((times[-1] - times[0]) / np.timedelta64(1, "D"))
    whole_days = bool((times == times.astype("datetime64[D]")).all())
    for unit, (_, _, _, length) in _UNITS.items():
        if days < _MOST_BINS * length and not (unit == "hour" and whole_days):
            return unit
    return "decade"


def _middle(sample: np.ndarray) -> np.ndarray:
    """The sample's dates without the lowest and highest 1%, sorted."""
    times = np.sort(sample[~np.isnat(sample)])
    cut = len(times) // 100
    return times[cut : len(times) - cut]


def bins_of(times: np.ndarray, unit: Unit) -> np.ndarray:
    """int64 (n,), the numbers of the bins that ``times``, datetime64[us], lie in."""
    base, step, shift, _ = _UNITS[unit]
    return (times.astype(f"datetime64[{base}]").astype(np.int64) + shift) // step


def _count_times(
    path: str, units: Mapping[str, Unit]
) -> dict[str, tuple[Unit, dict[tuple[int, int], int]]]:
    """Documents by cluster and bin, of columns of dates."""
    counts: dict[str, Counter[tuple[int, int]]] = {name: Counter() for name in units}
    for batch in map_batches(path, ["cluster_id", *units]) if units else ():
        clusters = batch.column("cluster_id").to_numpy()
        for name, unit in units.items():
            times = to_times(batch.column(name))
            assert times is not None
            there = ~np.isnat(times)
            pairs = _count_pairs(clusters[there], bins_of(times[there], unit))
            counts[name].update(dict(pairs))
    return {name: (unit, dict(counts[name])) for name, unit in units.items()}


def _times_of(sample: np.ndarray, unit: Unit, counts: dict[tuple[int, int], int]) -> Times:
    bins = bins_of(_middle(sample), unit)
    window = range(0) if not len(bins) else range(int(bins[0]), int(bins[-1]) + 1)[-_MOST_BINS:]
    return Times(unit, counts, window)


def _count_pairs(clusters: np.ndarray, others: np.ndarray) -> Sequence[tuple[tuple[int, int], int]]:
    """How often each pair of a cluster id and another integer occurs."""
    if not len(clusters):
        return []
    low, span = int(others.min()), int(np.ptp(others)) + 1
    keys, counts = np.unique(clusters.astype(np.int64) * span + (others - low), return_counts=True)
    first, second = (keys // span).tolist(), (keys % span + low).tolist()
    return list(zip(zip(first, second, strict=True), counts.tolist(), strict=True))


def _as_lists(values: np.ndarray) -> tuple[list[int], list[int]]:
    unique, counts = np.unique(values, return_counts=True)
    return unique.tolist(), counts.tolist()


def _rounded(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def column_tables(columns: Sequence[KeptColumn]) -> dict[str, pa.Table]:
    """The tables below that have rows, by their files' names."""
    tables = {
        "over_time": over_time_table(columns),
        "column_values": column_values_table(columns),
    }
    return {name: table for name, table in tables.items() if table is not None}


def over_time_table(columns: Sequence[KeptColumn]) -> pa.Table | None:
    """``over_time.parquet``: column, unit, start, cluster_id, documents; None without dates."""
    rows = [
        (column.name, times.unit, times.start_of(number), cluster, count)
        for column in columns
        if (times := column.times) is not None
        for (cluster, number), count in sorted(times.counts.items(), key=lambda i: i[0][::-1])
    ]
    if not rows:
        return None
    names, units, starts, clusters, counts = zip(*rows, strict=True)
    return pa.table(
        {
            "column": pa.array(names, pa.string()),
            "unit": pa.array(units, pa.string()),
            "start": pa.array(np.array(starts, dtype="datetime64[us]")),
            "cluster_id": pa.array(clusters, pa.int32()),
            "documents": pa.array(counts, pa.int64()),
        }
    )


def column_values_table(columns: Sequence[KeptColumn]) -> pa.Table | None:
    """``column_values.parquet``: column, cluster_id, value, documents, sum, mean; or None.

    A number has a row a cluster, with ``sum`` and ``mean`` and no ``value``; a category a row for
    each value of a cluster, most frequent first, with neither; ``value`` is null for its nulls.
    """
    rows: list[tuple[str, int, str | None, int, float | None, float | None]] = []
    for column in columns:
        if (numbers := column.numbers) is not None:
            rows += [
                (column.name, c, None, n, numbers.sum_of(c), numbers.mean_of(c))
                for c, n in sorted(numbers.documents.items())
            ]
        ordered = sorted(column.counts.items(), key=lambda i: (i[0][0], -i[1], i[0][1] or ""))
        rows += [(column.name, c, value, n, None, None) for (c, value), n in ordered]
    if not rows:
        return None
    names, clusters, values, counts, sums, means = zip(*rows, strict=True)
    return pa.table(
        {
            "column": pa.array(names, pa.string()),
            "cluster_id": pa.array(clusters, pa.int32()),
            "value": pa.array(values, pa.string()),
            "documents": pa.array(counts, pa.int64()),
            "sum": pa.array(sums, pa.float64()),
            "mean": pa.array(means, pa.float64()),
        }
    )
