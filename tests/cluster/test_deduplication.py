"""Deduplication as a whole: what is removed has a kept one like it, whatever the order of files."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_ray import inline_units

from cluster import duplicates, vector_duplicates
from cluster.config import DeduplicateConfig
from cluster.deduplication import deduplicate_corpus
from cluster.duplicates import find_duplicates, to_units
from pipelines.runtime import units
from pipelines.runtime.errors import InputError


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    monkeypatch.setattr(units, "unit_dataset", inline_units)


def corpus_of(n=400, dimension=24, copies=40, seed=0):
    """Rows as dicts: ``n`` documents and near-copies of the first ``copies``."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((n, dimension)).astype(np.float32)
    near = vectors[:copies] + 0.05 * random.standard_normal((copies, dimension)).astype(np.float32)
    rows = [{"id": f"doc-{i}", "embedding": v} for i, v in enumerate(vectors)]
    rows += [{"id": f"copy-{i}", "embedding": v} for i, v in enumerate(near)]
    for i, row in enumerate(rows):
        row["text"] = f"Text number {i} " + "word " * (i % 7)
        row["score"] = float((i * 37) % 101)
    return rows


def write(folder, rows, files=3):
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        own = [rows[i] for i in part]
        table = pa.table(
            {
                "id": [row["id"] for row in own],
                "text": [row["text"] for row in own],
                "score": [row["score"] for row in own],
                "embedding": pa.array(
                    [row["embedding"] for row in own],
                    pa.list_(pa.float32(), len(rows[0]["embedding"])),
                ),
            }
        )
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=50)
    return folder


def run(tmp_path, rows=None, output="out", **settings):
    if rows is not None:
        write(tmp_path / "in", rows)
    settings.setdefault("similarity", 0.98)
    settings = {"embeddings": str(tmp_path / "in"), "output": str(tmp_path / output), **settings}
    result = deduplicate_corpus(DeduplicateConfig(**settings))
    removed = pq.read_table(tmp_path / output / "removed.parquet").to_pylist()
    kept = pq.read_table(tmp_path / output / "kept.parquet")["id"].to_pylist()
    return result, removed, kept


def test_planted_copies_are_removed_and_name_what_is_kept(tmp_path):
    rows = corpus_of()
    result, removed, kept = run(tmp_path, rows)
    assert {row["id"] for row in removed} == {f"copy-{i}" for i in range(40)}
    assert all(row["kept_id"] == row["id"].replace("copy", "doc") for row in removed)
    assert kept == [f"doc-{i}" for i in range(400)]
    assert {row["reason"] for row in removed} == {"similar"}
    assert [row["group_id"] for row in removed] == list(range(40))
    by_id = {row["id"]: to_units(row["embedding"][None])[0] for row in rows}
    for row in removed:
        cosine = float(by_id[row["id"]].astype(float) @ by_id[row["kept_id"]].astype(float))
        assert row["similarity"] == pytest.approx(cosine, abs=1e-6)
    assert result.counts["removed"] == 40
    assert result.metrics["recall"]["value"] == 1.0
    assert result.metrics["recall"]["expected"] == 40


def test_chains_keep_both_ends(tmp_path):
    rows = corpus_of(50, copies=0)
    for chain in range(8):
        for step, angle in enumerate(np.deg2rad([0, 10, 20])):
            vector = np.zeros(24, np.float32)
            vector[2 * chain], vector[2 * chain + 1] = np.cos(angle), np.sin(angle)
            row = {"id": f"chain{chain}-{step}", "embedding": vector, "text": "", "score": 0.0}
            rows.append(row)
    _, removed, kept = run(tmp_path, rows, similarity=0.978)
    assert {row["id"] for row in removed} == {f"chain{chain}-1" for chain in range(8)}
    assert {row["kept_id"] for row in removed} <= set(kept)


@pytest.mark.parametrize("keep", ["longest", "central", "column:score"])
def test_the_order_of_rows_and_files_changes_nothing(tmp_path, keep):
    rows = corpus_of(copies=120)
    _, removed, kept = run(tmp_path, rows, keep=keep)
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    write(tmp_path / "in", shuffled, files=5)
    _, again, kept_again = run(tmp_path, output="again", keep=keep)
    assert again == removed
    assert set(kept_again) == set(kept)
    by_id = {row["id"]: row for row in rows}
    for row in removed:
        mine, other = by_id[row["id"]], by_id[row["kept_id"]]
        if keep == "longest":
            assert len(other["text"]) >= len(mine["text"])
        if keep == "column:score":
            assert other["score"] >= mine["score"]


_CLOCK = pa.timestamp("us", "Europe/Berlin")


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        # an hour apart, over the end of summer time: 02:30+02:00 is before 02:15+01:00
        (pa.array([datetime(2024, 10, 27, 0, 30), datetime(2024, 10, 27, 1, 15)], _CLOCK), 1),
        (pa.array([2**60 + 1, 2**60]), 0),
        (pa.array([str(2**60), str(2**60 + 1)]), 1),
        (pa.array(["9.5", "10"]), 1),
        (pa.array([np.float16(9), np.float16(10)], pa.float16()), 1),
        (pa.array([float("nan"), -1.0]), 1),
        (pa.array([None, timedelta(0)]), 1),
        (pa.array([b"\xff", b"\xfe"]), 0),
        (pa.array(["b", "a"]).dictionary_encode(), 0),
        (pa.array([datetime(1, 1, 1, tzinfo=UTC).date(), datetime(9999, 1, 1).date()]), 1),
    ],
)
@pytest.mark.parametrize("method", ["vectors", "text"])
def test_the_one_with_the_greatest_value_is_kept(tmp_path, values, kept, method):
    vectors = pa.array([[1.0, 0.5], [1.0, 0.5]], pa.list_(pa.float32()))
    table = {"id": [0, 1], "text": ["The same."] * 2, "value": values, "embedding": vectors}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(table), tmp_path / "in" / "0.parquet")
    _, removed, found = run(tmp_path, keep="column:value", method=method)
    assert found == [kept]
    assert [row["kept_id"] for row in removed] == [kept]


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        (["ääää", "abcdef"], 1),  # as many bytes as characters in one, twice as many in the other
        ([12, 345], 1),
        ([b"\xff\xff", b"abc"], 1),
        ([None, "a"], 1),
    ],
)
def test_the_longest_has_the_most_characters(tmp_path, texts, kept):
    vectors = pa.array([[1.0, 0.5], [1.0, 0.5]], pa.list_(pa.float32()))
    (tmp_path / "in").mkdir()
    table = pa.table({"id": [0, 1], "text": texts, "embedding": vectors})
    pq.write_table(table, tmp_path / "in" / "0.parquet")
    assert run(tmp_path, keep="longest")[2] == [kept]


@pytest.mark.parametrize("method", ["vectors", "text"])
def test_columns_that_cannot_order_are_refused_and_the_option_is_named(tmp_path, method):
    write(tmp_path / "in", corpus_of(10, copies=0), files=1)
    with pytest.raises(InputError, match=r"no column 'none'; .* Name the right one with --keep$"):
        run(tmp_path, keep="column:none", method=method)
    with pytest.raises(
        InputError, match=r"is (fixed_size_)?list<.*(no order|texts and labels must be)"
    ):
        run(tmp_path, output="lists", keep="column:embedding", method=method)
    with pytest.raises(InputError, match=r"no column 'body'; .* with --text-column$"):
        run(tmp_path, output="texts", keep="longest", text_column="body", method=method)
    np.save(tmp_path / "in.npy", np.eye(3))
    with pytest.raises(InputError, match="holds vectors only, so there is no column 'text'"):
        run(tmp_path, output="npy", keep="longest", embeddings=str(tmp_path / "in.npy"))


def test_crowds_are_decided_in_rounds_as_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 2)
    monkeypatch.setattr(vector_duplicates, "_GROUP_BYTES", 4_000)
    random = np.random.default_rng(4)
    rows = corpus_of(400, dimension=4, copies=0)
    centres = random.standard_normal((40, 4))
    for row in rows:
        near = centres[random.integers(40)] + 0.2 * random.standard_normal(4)
        row["embedding"] = near.astype(np.float32)
    result, removed, _ = run(tmp_path, rows, similarity=0.95)
    assert result.metrics["rounds"] > 1
    expected = find_duplicates(np.stack([row["embedding"] for row in rows]), 0.95).keepers
    assert {int(r["id"][4:]): int(r["kept_id"][4:]) for r in removed} == {
        i: int(k) for i, k in enumerate(expected) if k >= 0
    }
    recall = result.metrics["recall"]
    assert recall["removed"] == recall["expected"] > 100


def test_identical_and_zero_vectors(tmp_path):
    rows = corpus_of(30, copies=0)
    for place in (3, 9):
        rows[place]["embedding"] = np.zeros(24, np.float32)
    rows[20]["embedding"] = rows[5]["embedding"] * 3
    result, removed, kept = run(tmp_path, rows, similarity=1.0)
    assert [(row["id"], row["kept_id"]) for row in removed] == [("doc-20", "doc-5")]
    assert removed[0]["similarity"] == 1.0
    assert {"doc-3", "doc-9"} <= set(kept)
    assert result.counts["not_comparable"] == 2


def test_all_alike_leave_one(tmp_path):
    rows = corpus_of(300, copies=0)
    for row in rows:
        row["embedding"] = np.ones(24, np.float32)
    _, removed, kept = run(tmp_path, rows)
    assert kept == ["doc-0"]
    assert {row["reason"] for row in removed} == {"identical"}


def test_only_zero_vectors_are_all_kept(tmp_path):
    rows = corpus_of(20, copies=0)
    for row in rows:
        row["embedding"] = np.zeros(24, np.float32)
    _, removed, kept = run(tmp_path, rows)
    assert (removed, len(kept)) == ([], 20)


def test_against_removes_what_is_like_the_other_set_only(tmp_path):
    rows = corpus_of()
    write(tmp_path / "other", [rows[2], rows[7]], files=1)
    rest = [row for row in rows if row["id"] not in ("doc-2", "doc-7")]
    result, removed, kept = run(tmp_path, rest, against=str(tmp_path / "other"))
    assert [(row["id"], row["kept_id"]) for row in removed] == [
        ("copy-2", "doc-2"),
        ("copy-7", "doc-7"),
    ]
    assert "copy-3" in kept
    assert "doc-2" not in kept
    assert result.counts["against"] == 2


def test_clean_rows_have_all_columns(tmp_path):
    rows = corpus_of()
    run(tmp_path, rows, write_clean=True)
    clean = pq.read_table(tmp_path / "out" / "clean")
    assert clean["id"].to_pylist() == [f"doc-{i}" for i in range(400)]
    assert clean.schema.equals(pq.read_table(tmp_path / "in" / "0.parquet").schema)
    assert clean["score"].to_pylist() == [row["score"] for row in rows[:400]]


def test_clean_rows_keep_timestamps_of_any_year(tmp_path):
    years = pa.array([datetime(9999, 12, 31), datetime(1, 1, 1)], pa.timestamp("us"))
    vectors = pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float32()))
    table = pa.table({"id": ["a", "b"], "until": years, "embedding": vectors})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "0.parquet", use_deprecated_int96_timestamps=True)
    run(tmp_path, write_clean=True)
    assert pq.read_table(tmp_path / "out" / "clean")["until"].to_pylist() == years.to_pylist()


def test_the_curve_counts_what_each_threshold_removes(tmp_path):
    rows = corpus_of()
    run(tmp_path, rows, similarity=0.9)
    curve = pq.read_table(tmp_path / "out" / "curve.parquet").to_pylist()
    at = {row["similarity"]: row for row in curve}
    assert at[0.9] == {"similarity": 0.9, "removed": 40, "share": 40 / 440, "exact": True}
    assert not at[0.8]["exact"]
    for threshold in (0.98, 0.995, 0.999):
        _, removed, _ = run(tmp_path, output=f"at-{threshold}", similarity=threshold)
        assert at[threshold]["removed"] == len(removed)


def test_the_curve_estimates_among_those_that_can_be_compared(tmp_path):
    rows = corpus_of(60, copies=60)
    zeros = [{**row, "id": f"zero-{i}", "embedding": np.zeros(24)} for i, row in enumerate(rows)]
    run(tmp_path, [*rows, *zeros], similarity=0.99500049)
    curve = pq.read_table(tmp_path / "out" / "curve.parquet").to_pylist()
    assert {row["removed"] for row in curve if row["similarity"] < 0.97} == {60}
    assert {row["share"] for row in curve if row["similarity"] < 0.97} == {0.25}
    assert [row["similarity"] for row in curve if row["exact"]] == [0.99500049, 0.999]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    rows = corpus_of()
    whole, removed, _ = run(tmp_path, rows)
    done = []
    monkeypatch.setattr(
        "cluster.deduplication.write_lists", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, output="stopped")
    monkeypatch.undo()
    monkeypatch.setattr(
        units, "unit_dataset", lambda missing: done.extend(missing) or inline_units(missing)
    )
    result, again, _ = run(tmp_path, output="stopped")
    assert again == removed
    assert result.counts == whole.counts
    assert not any(name.startswith(("part", "group")) for name in done[:-3])
    assert not (tmp_path / "stopped" / "_work").exists()


def test_similar_texts_are_verified_word_by_word(tmp_path):
    random = np.random.default_rng(2)
    words = [f"word{i}" for i in range(3_000)]
    rows = corpus_of(150, copies=0)
    for i, row in enumerate(rows):
        row["text"] = " ".join(random.choice(words, 60))
        if i >= 100:
            near = rows[i - 100]["text"].split()
            near[i % 50] = "changed"
            row["text"] = "  ".join(near).upper()
    rows[99]["text"] = ""
    result, removed, kept = run(tmp_path, rows, method="text", similarity=0.8)
    assert {row["id"] for row in removed} == {f"doc-{i}" for i in range(100, 150)}
    assert all(int(row["kept_id"][4:]) == int(row["id"][4:]) - 100 for row in removed)
    for row in removed[:5]:
        mine, other = ({t[i : i + 5] for i in range(len(t) - 4)} for t in texts_of(rows, row))
        expected = len(mine & other) / len(mine | other)
        assert row["similarity"] == pytest.approx(expected, abs=1e-6)
    assert result.counts["not_comparable"] == 1
    assert "doc-99" in kept


def texts_of(rows, pair):
    by_id = {row["id"]: " ".join(row["text"].lower().split()) for row in rows}
    return by_id[pair["id"]], by_id[pair["kept_id"]]


def test_texts_against_another_set(tmp_path):
    rows = corpus_of(60, copies=0)
    words = np.random.default_rng(3)
    for row in rows:
        row["text"] = " ".join(f"w{n}" for n in words.integers(0, 10_000, 40))
    write(tmp_path / "other", rows[:2], files=1)
    _, removed, kept = run(
        tmp_path, rows[1:], method="text", against=str(tmp_path / "other"), similarity=None
    )
    assert [(r["id"], r["kept_id"], r["similarity"]) for r in removed] == [("doc-1", "doc-1", 1.0)]
    assert removed[0]["reason"] == "identical to one of --against"
    assert len(kept) == 58


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"similarity": 1.5}, "--similarity is 1.5"),
        ({"similarity": 0.0}, "--similarity is 0.0"),
        ({"similarity": float("nan")}, "--similarity is nan"),
        ({"keep": "best"}, "--keep is 'best'"),
        ({"keep": "column:"}, "--keep is 'column:'"),
        ({"against": "x", "keep": "longest"}, "leave --keep out"),
        ({"method": "text", "keep": "central"}, "--keep central needs vectors"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(InputError, match=told.replace("(", r"\(")):
        DeduplicateConfig(**settings)


def test_another_encoder_and_repeated_ids_are_refused(tmp_path):
    rows = corpus_of(20, copies=0)
    write(tmp_path / "in", rows, files=1)
    write(tmp_path / "other", rows, files=1)
    for name, fingerprint in (("in", b"a"), ("other", b"b")):
        path = tmp_path / name / "0.parquet"
        table = pq.read_table(path)
        table = table.replace_schema_metadata({b"shoal.encoder_fingerprint": fingerprint})
        pq.write_table(table, path)
    with pytest.raises(InputError, match=r"fingerprint b, .* with a: embed both"):
        run(tmp_path, against=str(tmp_path / "other"))
    with pytest.raises(InputError, match="1 rows repeat the 'id' of another"):
        run(tmp_path, [*rows, {**rows[0]}], output="twice")


def test_the_page_holds_the_pairs_and_no_markup_of_theirs(tmp_path):
    rows = corpus_of()
    rows[0]["text"] = "<script>alert(1)</script> first"
    run(tmp_path, rows)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    data = page.split('id="data">')[1].split("</script>")[0]
    pairs = json.loads(data)["pairs"]
    assert any(pair["id"] == "copy-0" and pair["keptText"].endswith("first") for pair in pairs) or (
        len(pairs) > 0 and all(pair["text"] for pair in pairs)
    )


def test_clean_rows_of_files_with_other_columns_and_of_partitions(tmp_path):
    rows = corpus_of(60, copies=6)
    write(tmp_path / "in" / "thing=a", rows[:40], files=2)
    path = tmp_path / "in" / "thing=a" / "1.parquet"
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.append_column("extra", pa.array(["x"] * len(table))), path)
    write(tmp_path / "in" / "thing=b", rows[40:], files=1)
    run(tmp_path, write_clean=True)
    found = {}
    for file in sorted((tmp_path / "out" / "clean").iterdir()):
        for row in pq.read_table(file).to_pylist():
            found[row["id"]] = (row["thing"], row.get("extra"))
    assert set(found) == {f"doc-{i}" for i in range(60)}
    assert found["doc-3"] == ("a", None)
    assert found["doc-30"] == ("a", "x")
    assert found["doc-50"] == ("b", None)
