"""Kept columns: counts and exact sums by cluster, dates in bins, whatever the batch."""

import datetime as dt
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import document_map, kept_columns
from cluster.kept_columns import (
    bins_of,
    column_tables,
    column_values_table,
    over_time_table,
    read_kept_columns,
    to_times,
)
from cluster.report_columns import columns_data, has_colours


def read(folder, columns, clusters=None, shown=None, rows_at_a_time=1_000):
    """The kept ``columns`` of a map whose documents are numbered from 0."""
    count = len(next(iter(columns.values())))
    clusters = np.zeros(count) if clusters is None else clusters
    table = pa.table(
        {"id": pa.array(range(count)), "cluster_id": pa.array(clusters, pa.int32()), **columns}
    )
    path = str(folder / "map.parquet")
    pq.write_table(table, path, row_group_size=rows_at_a_time)
    return read_kept_columns(path, pa.array(range(count) if shown is None else shown, pa.int64()))


def test_categories_are_counted_by_cluster_and_nulls_apart(tmp_path):
    words = ["a", "b", None, "a", "a", None]
    column = read(tmp_path, {"kind": pa.array(words)}, [0, 0, 0, 1, 1, -1])[0]
    assert column.kind == "category"
    assert column.counts == {
        (0, "a"): 1, (0, "b"): 1, (0, None): 1, (1, "a"): 2, (-1, None): 1
    }  # fmt: skip
    assert column.sample.tolist() == words
    rows = column_values_table([column]).to_pylist()
    assert rows[0] == {
        "column": "kind", "cluster_id": -1, "value": None, "documents": 1, "sum": None, "mean": None
    }  # fmt: skip
    assert [(row["cluster_id"], row["value"]) for row in rows[1:4]] == [
        (0, None), (0, "a"), (0, "b")
    ]  # fmt: skip


def test_truth_values_are_categories_and_lists_are_passed_over(tmp_path):
    columns = {
        "flag": pa.array([True, None, False]),
        "tags": pa.array([["a"], [], None]),
        "raw": pa.array([b"a", b"b", None]),
    }
    found = read(tmp_path, columns)
    assert [column.name for column in found] == ["flag"]
    assert found[0].sample.tolist() == ["true", None, "false"]


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 500])
def test_sums_are_exact_whatever_the_batch_and_the_order(tmp_path, rows_at_a_time):
    draw = np.random.default_rng(0)
    values = draw.standard_normal(500) * 10.0 ** draw.integers(-300, 300, 500)
    values[:4] = 1e308, -1e308, 5e-324, math.nan
    clusters = draw.integers(-1, 3, 500)
    order = draw.permutation(500)
    columns = {"n": pa.array(values[order])}
    numbers = read(tmp_path, columns, clusters[order], rows_at_a_time=rows_at_a_time)[0].numbers
    for cluster in (-1, 0, 1, 2):
        expected = [Fraction(v) for v in values[(clusters == cluster) & np.isfinite(values)]]
        assert numbers.sums[cluster] == sum(expected)
        assert numbers.documents[cluster] == len(expected)
        assert numbers.mean_of(cluster) == float(sum(expected) / len(expected))
        assert numbers.sum_of(cluster) == math.fsum(map(float, expected))


def test_a_small_number_is_not_lost_beside_a_large_one(tmp_path):
    numbers = read(tmp_path, {"n": pa.array([1e300, 0.1, -1e300])})[0].numbers
    assert numbers.sum_of(0) == 0.1
    assert read(tmp_path, {"n": pa.array([1e308, 1e308])})[0].numbers.sum_of(0) == math.inf


def test_numbers_without_a_value_are_left_out(tmp_path):
    values = pa.array([None, math.inf, math.nan, 3.0])
    column = read(tmp_path, {"n": values}, [0, 0, 1, 2])[0]
    assert column.numbers.documents == {2: 1}
    assert column.numbers.mean_of(0) is None
    rows = column_values_table([column]).to_pylist()
    assert rows == [
        {"column": "n", "cluster_id": 2, "value": None, "documents": 1, "sum": 3.0, "mean": 3.0}
    ]


@pytest.mark.parametrize(
    "values", [pa.array([1, None, 3]), pa.array([1, None, 3], pa.decimal128(9, 2))]
)
def test_integers_and_decimals_are_numbers(tmp_path, values):
    numbers = read(tmp_path, {"n": values})[0].numbers
    assert (numbers.documents[0], numbers.sum_of(0), numbers.mean_of(0)) == (2, 4.0, 2.0)


def test_a_column_of_too_many_values_is_not_counted_whatever_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_columns, "MOST_VALUES", 5)
    for rows_at_a_time in (1, 100):
        six = {"n": pa.array([f"v{i % 6}" for i in range(100)])}
        five = {"n": pa.array([f"v{i % 5}" for i in range(100)])}
        assert read(tmp_path, six, rows_at_a_time=rows_at_a_time)[0].counts == {}
        assert len(read(tmp_path, five, rows_at_a_time=rows_at_a_time)[0].counts) == 5


def test_bytes_that_are_no_utf_8_are_read_as_others_are(tmp_path):
    raw = pa.array([b"caf\xe9", b"caf\xe9", b"tea", None])
    values = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    column = read(tmp_path, {"w": values})[0]
    assert column.counts == {(0, "caf\ufffd"): 2, (0, "tea"): 1, (0, None): 1}
    assert len(column_values_table([column])) == 3


@pytest.mark.parametrize("kind", [pa.float16(), pa.uint64(), pa.int8(), pa.decimal256(50, 3)])
def test_numbers_of_every_width_are_added(tmp_path, kind):
    values = pa.array([1, 2, None], pa.int64()).cast(kind)
    assert read(tmp_path, {"n": values})[0].numbers.sum_of(0) == 3


def test_long_texts_are_not_read_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(document_map, "_BATCH_BYTES", 100_000)
    read(
        tmp_path, {"text": pa.array([f"{i} " + random.randbytes(500).hex() for i in range(2_000)])}
    )
    batches = list(document_map.map_batches(str(tmp_path / "map.parquet"), ["text"]))
    assert max(batch.nbytes for batch in batches) < 200_000
    assert sum(batch.num_rows for batch in batches) == 2_000


TIMES = {
    "2026-03-01": "2026-03-01",
    "2026-03-01 05:06": "2026-03-01T05:06",
    "2026-03-01T05:06:07.123456789": "2026-03-01T05:06:07.123456",
    "2026-03-01T23:30:00-02:00": "2026-03-02T01:30",
    "2026-03-01T05:06:07Z": "2026-03-01T05:06:07",
    "": "NaT",
}


def test_strings_by_iso_8601_are_dates(tmp_path):
    found = to_times(pa.array([*TIMES, None]))
    assert found.tolist() == np.array([*TIMES.values(), "NaT"], "datetime64[us]").tolist()
    column = read(tmp_path, {"when": pa.array([*TIMES, None])})[0]
    assert column.kind == "date"
    assert np.isnat(column.sample).tolist() == [False] * 5 + [True] * 2


@pytest.mark.parametrize("word", ["2026-02-30", "soon", "2026-3-1", "2026", "2026-03-01x"])
@pytest.mark.parametrize("place", [0, 5, 9])
def test_one_string_that_is_no_date_makes_all_a_category(tmp_path, word, place):
    values = ["2026-03-01"] * 9
    values.insert(place, word)
    column = read(tmp_path, {"when": pa.array(values)}, rows_at_a_time=2)[0]
    assert column.kind == "category"
    assert column.counts == {(0, "2026-03-01"): 9, (0, word): 1}


def test_a_column_without_any_value_is_no_date(tmp_path):
    columns = {
        "when": pa.array([None, None], pa.string()),
        "day": pa.array([None] * 2, pa.date32()),
    }
    when, day = read(tmp_path, columns)
    assert (when.kind, day.kind) == ("category", "date")
    assert over_time_table([when, day]) is None
    assert columns_data([when, day], [0], 1.0)[1]["time"]["starts"] == []
    assert not has_colours(when)
    assert not has_colours(day)


def naive_start(time, unit):
    """When the bin of a datetime begins."""
    day = time.replace(hour=0, minute=0, second=0, microsecond=0)
    first = day.replace(day=1)
    return {
        "hour": time.replace(minute=0, second=0, microsecond=0),
        "day": day,
        "week": day - dt.timedelta(days=day.weekday()),
        "month": first,
        "quarter": first.replace(month=1 + (time.month - 1) // 3 * 3),
        "year": first.replace(month=1),
        "decade": first.replace(month=1, year=time.year // 10 * 10),
    }[unit]


DAYS = {"hour": 2, "day": 50, "week": 400, "month": 1_500, "quarter": 4_000, "year": 20_000}


@pytest.mark.parametrize(("unit", "days"), [*DAYS.items(), ("decade", 90_000)])
def test_dates_are_counted_in_bins_that_suit_their_span(tmp_path, unit, days):
    draw = np.random.default_rng(0)
    first = dt.datetime(1931, 5, 6)
    times = [first + dt.timedelta(days=float(d)) for d in draw.uniform(0, days, 300)]
    clusters = draw.integers(0, 3, 300)
    column = read(tmp_path, {"when": pa.array(times)}, clusters, rows_at_a_time=11)[0]
    assert column.times.unit == unit
    expected = Counter(
        (naive_start(time, unit), int(cluster))
        for time, cluster in zip(times, clusters, strict=True)
    )
    rows = over_time_table([column]).to_pylist()
    assert {(r["start"], r["cluster_id"]): r["documents"] for r in rows} == expected
    assert [row["start"] for row in rows] == sorted(row["start"] for row in rows)
    assert {row["unit"] for row in rows} == {unit}
    assert 1 < len(column.times.window) <= 60


def test_days_are_not_cut_into_hours(tmp_path):
    days = pa.array([dt.date(2026, 1, 1), dt.date(2026, 1, 2)] * 5)
    assert read(tmp_path, {"day": days})[0].times.unit == "day"


def test_dates_of_a_zone_are_counted_in_utc(tmp_path):
    time = dt.datetime(2026, 1, 1, 0, 30, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    column = read(tmp_path, {"t": pa.array([time], pa.timestamp("ms", "Europe/Helsinki"))})[0]
    assert column.sample.tolist() == [dt.datetime(2025, 12, 31, 22, 30)]


def test_a_few_far_dates_do_not_coarsen_all_others_and_are_not_lost(tmp_path):
    draw = np.random.default_rng(0)
    days = [dt.date(2026, 1, 1) + dt.timedelta(days=int(d)) for d in draw.integers(0, 40, 997)]
    far = [dt.date(1, 1, 1), dt.date(1970, 1, 1), dt.date(9999, 12, 31)]
    column = read(tmp_path, {"day": pa.array(days + far)})[0]
    assert column.times.unit == "day"
    assert column.times.start_of(column.times.window[0]) == np.datetime64("2026-01-01")
    assert sum(over_time_table([column]).column("documents").to_pylist()) == 1_000
    shown = columns_data([column], [0], 1.0)[0]["time"]
    assert shown["outside"] == 3
    assert sum(shown["totals"]) == sum(shown["counts"][0]) == 997


def test_weeks_begin_on_monday():
    times = np.array(["2026-03-01", "2026-03-02", "2026-03-08"], dtype="datetime64[us]")
    before, first, last = bins_of(times, "week").tolist()
    assert before + 1 == first == last


def test_the_sample_has_the_values_of_its_documents_in_its_order(tmp_path):
    columns = {"n": pa.array(np.arange(50.0)), "w": pa.array([f"w{i % 9}" for i in range(50)])}
    number, word = read(tmp_path, columns, shown=[7, 3, 49, 0], rows_at_a_time=4)
    assert number.sample.tolist() == [7, 3, 49, 0]
    assert word.sample.tolist() == ["w7", "w3", "w4", "w0"]


def test_a_map_without_kept_columns_has_no_tables(tmp_path):
    assert read(tmp_path, {"x": pa.array([1.0, 2.0])}) == []
    assert column_tables([]) == {}


def classes(column):
    data = columns_data([column], [0], 1.0)[0]
    return data["legend"], data["codes"]


def test_colours_are_the_eight_most_frequent_values_the_rest_and_none(tmp_path):
    values = [f"v{i}" for i in range(10) for _ in range(20 - i)] + [None, " "]
    legend, codes = classes(read(tmp_path, {"w": pa.array(values)})[0])
    assert legend == [f"v{i}" for i in range(8)]
    assert Counter(codes) == {**{i: 20 - i for i in range(8)}, -2: 12 + 11 + 1, -1: 1}


def test_titles_have_no_colours(tmp_path):
    column = read(tmp_path, {"w": pa.array([f"title {i}" for i in range(20)])})[0]
    assert not has_colours(column)
    assert classes(column) == ([], [])


def test_numbers_are_coloured_by_equal_shares(tmp_path):
    values = pa.array([*(2.0 ** np.arange(70)), None])
    legend, codes = classes(read(tmp_path, {"n": values})[0])
    assert legend[0] == "1 – 512"
    assert Counter(codes) == {**dict.fromkeys(range(7), 10), -1: 1}
    assert codes[:-1] == sorted(codes[:-1])


def test_few_numbers_and_dates_are_classes_of_their_own(tmp_path):
    years = pa.array([2019, 2021, 2021, None])
    assert classes(read(tmp_path, {"n": years})[0]) == (["2019", "2021"], [0, 1, 1, -1])
    days = pa.array([dt.date(2026, 1, 2), None, dt.date(2025, 1, 2)])
    assert classes(read(tmp_path, {"d": days})[0]) == (["2025-01-02", "2026-01-02"], [1, -1, 0])


def test_figures_are_those_of_the_clusters_asked_for(tmp_path):
    columns = {"n": pa.array([1.0, 2.0, 4.0]), "w": pa.array(["a", "b", "b"])}
    number, word = columns_data(read(tmp_path, columns, [5, 5, 2]), [2, 9, 5], 1.0)
    assert number["sum"] == [4.0, 0.0, 3.0]
    assert number["mean"] == [4.0, None, 1.5]
    assert [[(word["values"][v], n) for v, n in top] for top in word["top"]] == [
        [("b", 1)], [], [("a", 1), ("b", 1)]
    ]  # fmt: skip
