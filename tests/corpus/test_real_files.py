"""Corpora as their usual writers leave them, read to documents: no Ray, no model."""

import bz2
import gzip
import io
import json
import lzma
import uuid
from collections import Counter
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import datasets
import duckdb
import fsspec
import lance
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import zstandard
from deltalake import DeltaTable, write_deltalake
from writers import write_arrow, write_lance, write_pyarrow

from pipelines.corpus.detected import describe_corpus
from pipelines.corpus.documents import Checker, read_documents
from pipelines.corpus.files import (
    Columns,
    CorpusOptions,
    Shard,
    find_corpus,
    find_files,
    listing_of,
)
from pipelines.corpus.kept_columns import json_to_values, parquet_schema, resolve_type
from pipelines.corpus.readers import inspect_files, read_shard
from pipelines.runtime.errors import InputError
from pipelines.training.pair_files import list_pair_files

ROWS = [{"id": number, "text": f"Text number {number}"} for number in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXTS = [row["text"] for row in ROWS]


def read(corpus, text="text", row_id=None, keep=(), **options):
    """Accepted documents (kept columns as they will be stored), and reasons of rejected rows."""
    columns = Columns(text, row_id, tuple(keep))
    asked = CorpusOptions(**options)
    files = inspect_files(
        find_files(str(corpus), asked), columns, shard_bytes=1 << 20, options=asked
    )
    assert not [file.problem for file in files if file.problem]
    schema = parquet_schema(files, columns.keep, columns.text)
    checker = Checker(columns.keep, schema, 10**6)
    rows = []
    for file in files:
        for shard in file.shards():
            unit = json.loads(json.dumps(shard.to_unit()))  # as a worker gets it
            for batch in read_shard(Shard.from_unit(unit), columns):
                rows += checker.check(batch)[0].to_pylist()
    for name in keep if schema is None else ():
        kind = resolve_type(checker.kept_kinds[name])
        texts = pa.chunked_array([pa.array([row[f"kept.{name}"] for row in rows], pa.string())])
        for row, value in zip(rows, json_to_values(texts, kind).to_pylist(), strict=True):
            row[f"kept.{name}"] = value
    return rows, dict(checker.reasons)


def ids_and_texts(corpus, **arguments):
    rows, rejected = read(corpus, **arguments)
    assert not rejected
    return {row["id"]: row["text"] for row in rows}


EXPECTED = {str(row["id"]): row["text"] for row in ROWS}


# ---- JSON


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.json", bytes),
        ("c4-train.00000-of-01024.json.gz", gzip.compress),
        ("old.json", lambda data: data.replace(b"\n", b"\r")),
        ("utf16.json", lambda data: data.decode().encode("utf-16")),
        ("a.jsonl.xz", lzma.compress),
        ("two.jsonl.xz", lambda data: lzma.compress(data[:100]) + lzma.compress(data[100:])),
        ("a.jsonl.bz2", bz2.compress),
        ("a.jsonl.lz4", lambda data: pa.compress(data, "lz4", asbytes=True)),
        ("a.jsonl.zst", zstandard.compress),
        ("two.jsonl.zst", lambda d: zstandard.compress(d[:99]) + zstandard.compress(d[99:])),
        ("skip.jsonl.zst", lambda d: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(d)),
        ("old.jsonl", lambda data: data.replace(b"\n", b"\r")),
        ("utf16.jsonl", lambda data: data.decode().encode("utf-16")),
        ("utf32.jsonl.gz", lambda data: gzip.compress(data.decode().encode("utf-32"))),
    ],
)
def test_json_lines_under_every_usual_name(tmp_path, name, pack):
    if name == "a.jsonl.lz4":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "lz4") as stream:
            stream.write(LINES.encode())
        (tmp_path / name).write_bytes(sink.getvalue())
    else:
        (tmp_path / name).write_bytes(pack(LINES.encode()))
    assert ids_and_texts(tmp_path) == EXPECTED


def test_a_folder_of_any_name_is_read_by_its_address(tmp_path):
    folder = tmp_path / "50% of #1, what?"
    folder.mkdir()
    (folder / "a.jsonl").write_text(LINES)
    assert ids_and_texts(f"file://{folder}") == EXPECTED
    assert ids_and_texts(f"file://{tmp_path}/*/a.jsonl") == EXPECTED


def test_a_zstd_frame_with_a_long_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packed.compress(LINES.encode()) + packed.flush())
    assert ids_and_texts(tmp_path) == EXPECTED


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.xz", "a.jsonl.gz"])
def test_a_cut_file_is_an_error_of_one_line_that_names_it(tmp_path, name):
    pack = {"zst": zstandard.compress, "xz": lzma.compress, "gz": gzip.compress}
    rows = [{"text": f"{number} {uuid.uuid4()}"} for number in range(100_000)]
    data = pack[name[-3:].strip(".")]("".join(json.dumps(r) + "\n" for r in rows).encode())
    (tmp_path / name).write_bytes(data[:-30])
    (file,) = inspect_files(find_files(str(tmp_path)), Columns(), shard_bytes=1 << 20)
    with pytest.raises(InputError, match=rf"{name}: it cannot be read: .*; mend or remove"):
        list(read_documents(file.shards()[0], Columns(), Counter()))
    seen = 0
    with pytest.raises(OSError):
        for batch in read_shard(file.shards()[0], Columns()):
            seen += len(batch.texts)
    assert seen > 50_000


def test_writers_of_json_lines_named_json(tmp_path):
    duckdb.execute(
        f"COPY (SELECT i AS id, 'Text number ' || i AS text FROM range(30) t(i)) "
        f"TO '{tmp_path}/duckdb.json'"
    )
    assert ids_and_texts(tmp_path) == EXPECTED
    datasets.Dataset.from_list(ROWS).to_json(str(tmp_path / "datasets.json"))
    assert ids_and_texts(tmp_path / "datasets.json") == EXPECTED


def test_a_json_array_is_refused_as_what_it_is(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    with pytest.raises(InputError, match=r"a\.json: a JSON array; it must be JSON lines"):
        find_files(str(tmp_path / "a.json"))
    (tmp_path / "a.json").rename(tmp_path / "a.jsonl")
    (file,) = inspect_files(find_files(str(tmp_path)), Columns(), shard_bytes=1 << 20)
    assert "JSON array" in file.problem


def test_json_that_describes_data_is_no_document(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "run.json").write_text(json.dumps({"job": "x"}, indent=1))
    (tmp_path / "one.json").write_text('{"num_examples": 30}')
    listing = find_corpus(str(tmp_path))
    assert [Path(file.path).name for file in listing.files] == ["a.jsonl"]
    assert len(listing.passed_over) == 3
    assert "dataset_info.json" in caplog.text


def test_a_first_line_of_json_that_is_cut_costs_itself_only(tmp_path):
    (tmp_path / "a.json").write_text('{"id": 30, "text": "cut\n' + LINES)
    rows, rejected = read(tmp_path)
    assert {row["id"]: row["text"] for row in rows} == EXPECTED
    assert rejected == {"malformed JSON line": 1}
    for content in ('{"docs": [\n{"text": "a"},\n{"text": "b"}\n]}', '{"a":\n{"text": "b"}\n}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(InputError, match="JSON over several lines"):
            find_files(str(tmp_path / "a.json"))


def test_a_key_that_not_every_line_or_file_has_is_null_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "one", "label": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"id": 2, "text": "two"}\n')
    rows, _ = read(tmp_path, keep=["label"])
    assert [row["kept.label"] for row in rows] == ["x", None]
    with pytest.raises(InputError, match=r"no kept column 'other'; its columns are id, text"):
        read(tmp_path, keep=["other"])


def test_a_key_of_the_last_line_is_kept_though_the_head_lacks_it(tmp_path):
    rows = [{"id": n, "text": f"{n} " + "word " * 600} for n in range(500)]
    rows.append({"id": 500, "text": "last", "label": "x"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, _ = read(tmp_path, keep=["label"])
    assert [row["kept.label"] for row in documents] == [None] * 500 + ["x"]


def test_a_line_without_an_id_gets_its_texts_hash_unless_the_key_was_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no id"}\n{"id": "k", "text": "an id"}\n')
    rows, rejected = read(tmp_path)
    assert [row["id"] for row in rows] == [None, "k"]
    assert not rejected
    rows, rejected = read(tmp_path, row_id="id")
    assert [row["id"] for row in rows] == ["k"]
    assert rejected == {"id is null": 1}


def test_a_text_within_an_object_or_a_struct(tmp_path):
    nested = [{"id": row["id"], "doc": {"text": row["text"], "lang": "en"}} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nested))
    for name in ("a.parquet", "a.jsonl"):
        rows, rejected = read(tmp_path / name, text="doc.text", keep=["doc.lang"])
        assert [row["text"] for row in rows] == TEXTS
        assert {row["kept.doc.lang"] for row in rows} == {"en"}
        assert not rejected


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_field_that_the_struct_of_one_file_lacks_is_null_there(tmp_path, kind):
    first = pa.table({"id": [1], "doc": [{"text": "one", "n": 5}]})
    second = pa.table({"id": [2], "doc": [{"text": "two"}]})
    for name, table in (("a", first), ("b", second)):
        path = tmp_path / f"{name}.{kind}"
        pl.from_arrow(table).write_ipc(path) if kind == "arrow" else pq.write_table(table, path)
    rows, rejected = read(tmp_path, text="doc.text", keep=("doc", "doc.n"))
    assert not rejected
    assert [row["kept.doc.n"] for row in rows] == [5, None]
    assert [row["kept.doc"]["n"] for row in rows] == [5, None]


def test_text_in_another_encoding_is_refused_by_name(tmp_path):
    lines = "".join(json.dumps({"text": f"café {n}"}, ensure_ascii=False) + "\n" for n in range(9))
    (tmp_path / "a.jsonl").write_bytes(lines.encode("cp1252"))
    (tmp_path / "b.jsonl").write_bytes(lines.encode("utf-16-le"))
    files = inspect_files(find_files(str(tmp_path)), Columns(), shard_bytes=1 << 20)
    assert "Windows-1252" in files[0].problem
    assert "UTF-16" in files[1].problem


@pytest.mark.parametrize(
    ("name", "pack", "problem"),
    [
        ("a.jsonl.gz", bytes, "it is not packed, and its name says gzip: rename it"),
        ("a.jsonl.xz", zstandard.compress, "it is packed with zstd, and its name says xz"),
        ("a.jsonl.gz", bz2.compress, "it is packed with bz2, and its name says gzip"),
        ("a.jsonl", gzip.compress, "what it holds is packed with gzip"),
        ("a.jsonl.gz", lambda d: gzip.compress(gzip.compress(d)), "what it holds is packed with"),
    ],
)
def test_a_file_packed_in_another_way_than_its_name_says_is_told(tmp_path, name, pack, problem):
    (tmp_path / name).write_bytes(pack(LINES.encode()))
    (file,) = inspect_files(find_files(str(tmp_path)), Columns(), shard_bytes=1 << 20)
    assert problem in file.problem


# ---- CSV and TSV


def test_a_tsv_does_not_quote(tmp_path):
    texts = [*TEXTS]
    texts[5], texts[25] = '"Quoted from here', 'and to here"'
    rows = "".join(f"{n}\t{text}\n" for n, text in enumerate(texts))
    (tmp_path / "two.tsv").write_text("id\ttext\n" + rows)
    assert list(ids_and_texts(tmp_path).values()) == texts
    texts[25] = "Text number 25"
    rows = "".join(f"{n}\t{text}\n" for n, text in enumerate(texts))
    (tmp_path / "two.tsv").write_text("id\ttext\n" + rows)
    assert list(ids_and_texts(tmp_path).values()) == texts


HARD = [
    'He said "hi"',
    "tab\there",
    "two\nlines",
    '"',
    "C:\\new\\table",
    'ends with \\"',
    "a,b;c",
    '""',
]


@pytest.mark.parametrize("sep", [",", "\t", ";", "|"])
@pytest.mark.parametrize("writer", ["pandas", "polars"])
def test_quoted_fields_of_any_delimiter_come_back(tmp_path, writer, sep):
    texts = HARD + TEXTS
    path = tmp_path / ("a.tsv" if sep == "\t" else "a.csv")
    ids = [f"k{n}" for n in range(len(texts))]
    if writer == "pandas":
        pd.DataFrame({"id": ids, "text": texts}).to_csv(path, sep=sep, index=False)
    else:
        pl.DataFrame({"id": ids, "text": texts}).write_csv(path, separator=sep)
    assert list(ids_and_texts(path).values()) == texts


def spark_csv(rows, sep):
    def field(text):
        if not any(mark in text for mark in f'{sep}"\n'):
            return text
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    return "".join(sep.join(map(field, row)) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("sep", "suffix"), [(",", "csv"), (";", "csv"), ("|", "csv"), ("\t", "csv"), ("\t", "tsv")]
)
def test_backslash_quoted_csv_as_spark_writes_it(tmp_path, sep, suffix):
    texts = [*TEXTS, *HARD, 'A disk of 5"', f'He said "it{sep} yes", and left']
    rows = [["id", "text"], *([str(n), text] for n, text in enumerate(texts))]
    (tmp_path / f"part-00000.{suffix}").write_text(spark_csv(rows, sep))
    # a part in which nothing is escaped, so that only the other tells the dialect
    last = f"a{sep} b"
    rows = [["id", "text"], ["99", last]]
    (tmp_path / f"part-00001.{suffix}").write_text(spark_csv(rows, sep))
    assert [*ids_and_texts(tmp_path).values()] == [*texts, last]


def test_empty_strings_in_quotes_are_empty_in_a_tsv_too(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\tlabel\n1\tone\t""\n2\ttwo\tx\n3\t""\tx\n')
    rows, rejected = read(tmp_path, keep=("label",))
    assert [(row["text"], row["kept.label"]) for row in rows] == [("one", ""), ("two", "x")]
    assert rejected == {"text is empty": 1}


def test_copy_text_of_postgresql(tmp_path):
    (tmp_path / "a.tsv").write_text(
        "id\ttext\tlabel\n1\ttwo\\nlines and a \\\\ and a\\ttab\t\\N\n2\tplain\tx\n"
    )
    rows, rejected = read(tmp_path, keep=["label"])
    assert [row["text"] for row in rows] == ["two\nlines and a \\ and a\ttab", "plain"]
    assert [row["kept.label"] for row in rows] == [None, "x"]
    assert not rejected


def test_copy_text_of_postgresql_with_json_in_it(tmp_path):
    about = {"title": 'a "b"', "text": "two\nlines"}
    copied = json.dumps(about).replace("\\", "\\\\")
    (tmp_path / "a.tsv").write_text(f'id\ttext\tabout\n1\tOne "q"\\nend\t{copied}\n2\tTwo\t\\N\n')
    rows, rejected = read(tmp_path, keep=("about",))
    assert not rejected
    assert [row["text"] for row in rows] == ['One "q"\nend', "Two"]
    assert json.loads(rows[0]["kept.about"]) == about
    assert rows[1]["kept.about"] is None


def test_backslashes_of_a_dump_without_nulls_stay_as_they_are(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\n1\ta \\\\ b and \\textbf\n2\t"a title"\n')
    assert ids_and_texts(tmp_path) == {"1": "a \\\\ b and \\textbf", "2": '"a title"'}


def test_a_file_that_shows_another_delimiter_keeps_it(tmp_path):
    (tmp_path / "a.csv").write_text('id;text\n1;"say ""hi""; there"\n')
    (tmp_path / "b.csv").write_text("id,text\n2,plain; and simple\n")
    (tmp_path / "c.csv").write_text("id;text, long\n3;one, two\n")
    rows, rejected = read(tmp_path / "[ab].csv")
    assert [row["text"] for row in rows] == ['say "hi"; there', "plain; and simple"]
    rows, _ = read(tmp_path / "[ac].csv", text="id")
    assert [row["text"] for row in rows] == ["1", "3"]
    assert not rejected


def test_the_dialect_can_be_said(tmp_path):
    (tmp_path / "a.csv").write_text("1~'it''s, so'\n2~plain\n")
    rows, _ = read(
        tmp_path, csv_delimiter="~", csv_quote="'", csv_header=("id", "text"), row_id="id"
    )
    assert [row["text"] for row in rows] == ["it's, so", "plain"]
    with pytest.raises(InputError, match="--csv-header names 3 columns, its first row has 2"):
        read(tmp_path, csv_delimiter="~", csv_quote="'", csv_header=("a", "b", "c"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (r"""1,'it\'s "so"; C:\\dir'""", {"csv_quote": "'", "csv_escape": "\\"}),
        (r'''1,"it's ""so""; C:\dir"''', {"csv_quote": '"'}),
        (r'''1,"it's ^"so^"; C:\dir"''', {"csv_escape": "^"}),
        (r'''1,"it's ]"so]"; C:\dir"''', {"csv_escape": "]"}),
        (
            r"""1;it's "so"\; C:\\dir""",
            {"csv_quote": "none", "csv_escape": "\\", "csv_delimiter": ";"},
        ),
        (
            r"""1;it's "so"^; C:\dir""",
            {"csv_quote": "none", "csv_escape": "^", "csv_delimiter": ";"},
        ),
    ],
)
def test_any_mark_can_be_the_quotation_mark_or_the_escape(tmp_path, content, said):
    mark = said.get("csv_delimiter", ",")
    (tmp_path / "a.csv").write_text(f"id{mark}text\n{content}\n2{mark}plain\n")
    assert ids_and_texts(tmp_path, **said) == {"1": r"""it's "so"; C:\dir""", "2": "plain"}


def test_rows_that_a_quote_glues_together_are_rejected_line_by_line(tmp_path):
    texts = [*TEXTS]
    texts[5], texts[25] = '"from here', 'to here"'
    content = "id,text,x\n" + "".join(f"{n},{text},1\n" for n, text in enumerate(texts))
    (tmp_path / "a.csv").write_text(content.replace('to here",1', 'to here"'))
    rows, rejected = read(tmp_path, csv_quote='"')
    assert len(rows) + sum(rejected.values()) == 30
    assert sum(rejected.values()) == 21


def test_long_texts_in_quotes_are_no_glued_rows(tmp_path):
    poem = "\n".join(f"line {n}, of a poem" for n in range(40))
    (tmp_path / "a.csv").write_text(f'id,text,x\n1,"{poem}",1\n2,short,1\n')
    assert ids_and_texts(tmp_path) == {"1": poem, "2": "short"}


# ---- types of columns


@pytest.mark.parametrize(
    "kind", [pa.string_view(), pa.large_string(), pa.binary(), pa.binary_view()]
)
def test_every_type_of_text_is_read_and_kept_as_string(tmp_path, kind):
    table = pa.table({"id": range(30), "text": pa.array(TEXTS).cast(pa.binary()).cast(kind)})
    pq.write_table(table.slice(0, 10), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": range(10, 30), "text": TEXTS[10:]}), tmp_path / "b.parquet")
    rows, _ = read(tmp_path, keep=["text"])
    assert [row["kept.text"] for row in rows] == TEXTS


def test_dictionaries_within_structs_are_read_over_row_groups(tmp_path):
    kind = pa.struct({"lang": pa.dictionary(pa.int8(), pa.string()), "n": pa.int32()})
    about = [{"lang": f"l{n % 3}", "n": n} for n in range(30)]
    table = pa.table({"text": TEXTS, "about": pa.array(about, kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    rows, _ = read(tmp_path, keep=("about",))
    assert [row["kept.about"] for row in rows] == about


def test_categories_of_polars_are_read_from_its_arrow_files(tmp_path):
    labels = pl.Series("label", ["x", None, "y"] * 10, dtype=pl.Categorical)
    pl.DataFrame({"text": TEXTS}).with_columns(labels).write_ipc(tmp_path / "a.arrow")
    rows, _ = read(tmp_path, keep=("label",))
    assert [row["kept.label"] for row in rows] == ["x", None, "y"] * 10


def test_a_large_row_group_is_read_page_by_page(tmp_path):
    texts = [str(n) * 500 for n in range(10**4, 3 * 10**4)]
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, tmp_path / "a.parquet", compression=None, use_dictionary=False)
    del table
    (file,) = inspect_files(find_files(str(tmp_path)), Columns(), shard_bytes=1 << 20)
    (shard,) = file.shards()
    before, held = pa.total_allocated_bytes(), []
    for batch in read_shard(shard, Columns()):
        assert batch.texts
        held.append(pa.total_allocated_bytes() - before)
    assert file.text_bytes > 45 << 20
    assert max(held) < 20 << 20


def test_of_a_record_batch_only_the_wanted_columns_are_unpacked(tmp_path):
    wide = pa.array([[*range(n, n + 1000)] for n in range(2000)])
    table = pa.table({"wide": wide, "doc": [{"text": f"text {n}"} for n in range(2000)]})
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    path = str(tmp_path / "a.arrow")
    with pa.ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table)
    columns = Columns("doc.text")
    (file,) = inspect_files(find_files(path), columns, shard_bytes=1 << 30)
    (shard,) = file.shards()
    before, held, texts = pa.total_allocated_bytes(), [], []
    for batch in read_shard(shard, columns):
        texts += batch.texts
        held.append(pa.total_allocated_bytes() - before)
    assert texts == [f"text {n}".encode() for n in range(2000)]
    assert max(held) < wide.nbytes / 20


def test_an_arrow_file_without_its_end_is_cut_off(tmp_path):
    write_arrow(tmp_path, pa.Table.from_pylist(ROWS), 10)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[:-100])
    (file,) = inspect_files(find_files(str(tmp_path)), Columns(), shard_bytes=1 << 20)
    assert file.problem.startswith("it cannot be read: it is cut off")


def test_a_record_batch_that_memory_has_no_room_for_is_refused(tmp_path, monkeypatch):
    pl.DataFrame({"text": ["a" * 1000] * 10}).write_ipc(tmp_path / "a.arrow")
    monkeypatch.setattr("pipelines.runtime.machines.usable_memory_bytes", lambda: 10_000)
    with pytest.raises(InputError, match=r"a.arrow: .* in memory at once, .*: write it in more"):
        read(tmp_path)
    pl.DataFrame({"text": ["a" * 1000] * 10}).write_ipc(tmp_path / "a.arrow", record_batch_size=2)
    assert len(read(tmp_path)[0]) == 10


def test_ids_that_are_uuids_or_decimals_or_bytes(tmp_path):
    keys = [uuid.UUID(bytes=b"sixteen letters!"), uuid.uuid4()]
    raw = [key.bytes for key in keys]
    storage = pa.array(raw, pa.binary(16))
    columns = {
        "uuid": pa.ExtensionArray.from_storage(pa.uuid(), storage),
        "fixed": storage,
        "decimal": pa.array([Decimal(5), Decimal(10**18)], pa.decimal128(38, 0)),
        "huge": pa.array([Decimal(5), Decimal(10**30)], pa.decimal128(38, 0)),
        "hash": pa.array([b"\x01\xff", b"ab"], pa.binary(2)),
    }
    pq.write_table(pa.table({**columns, "text": ["a", "b"]}), tmp_path / "a.parquet")

    def ids(name):
        return [row["id"] for row in read(tmp_path, row_id=name)[0]]

    assert ids("uuid") == ids("fixed") == [str(key) for key in keys]
    assert ids("decimal") == ["5", str(10**18)]
    assert ids("huge") == ["5", str(10**30)]
    assert ids("hash") == ["01ff", "6162"]


@pytest.mark.parametrize("form", ["parquet", "arrow", "csv"])
@pytest.mark.parametrize("wanted", [{}, {"text": "key"}, {"text": "key", "keep": ["k"]}])
def test_a_wanted_column_that_is_there_twice_is_refused(tmp_path, form, wanted):
    twice = {"text": "id", "key": "k"}[wanted.get("text", "text")]
    names = ["key", "text", twice, twice] if twice == "k" else ["text", twice, twice]
    table = pa.Table.from_arrays([pa.array(["a"])] * len(names), names=names)
    if form == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    elif form == "arrow":
        write_arrow(tmp_path, table, 1)
    else:
        (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join("a" * len(names)) + "\n")
    if wanted == {"text": "key"}:
        assert len(read(tmp_path, **wanted)[0]) == 1
    else:
        with pytest.raises(InputError, match=rf"a.{form} has 2 columns '{twice}'"):
            read(tmp_path, **wanted)


@pytest.mark.parametrize("write", [write_pyarrow, write_arrow, write_lance])
@pytest.mark.parametrize(
    "column",
    [
        pa.array([1.0]),
        pa.array([True]),
        pa.array([datetime(2026, 1, 2)]),
        pa.array([Decimal("1.50")]),
        pa.array([["a"]]),
        pa.array([{"a": "b"}]),
    ],
    ids=lambda column: str(column.type),
)
def test_a_type_that_no_text_or_id_has_is_refused_before_anything_is_read(tmp_path, write, column):
    write(tmp_path, pa.table({"text": ["a"], "key": column}), 1)
    with pytest.raises(InputError, match=r"column 'key' is .*; ids must be .* --id-column"):
        read(tmp_path, row_id="key")
    with pytest.raises(InputError, match=r"column 'key' is .*; texts must be .* --text-column"):
        read(tmp_path, text="key")


def test_ids_in_the_index_of_pandas(tmp_path):
    frame = pd.DataFrame({"id": range(100, 400, 10), "text": TEXTS}).set_index("id")
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=7)
    assert list(ids_and_texts(tmp_path)) == [str(n) for n in range(100, 400, 10)]


def test_an_index_of_pandas_that_does_not_fit_the_file_is_no_column(tmp_path):
    frame = pd.DataFrame({"text": TEXTS, "part": ["x", "y"] * 15})
    frame.index.name = "id"
    frame.to_parquet(tmp_path / "folders", partition_cols=["part"])
    table = pa.Table.from_pandas(frame)
    pads.write_dataset(
        table, tmp_path / "files", format="parquet", max_rows_per_file=10, max_rows_per_group=10
    )
    for name, write in (("arrow", write_arrow), ("lance", write_lance)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, table, 7)
    for name in ("folders", "files", "arrow", "lance"):
        rows, rejected = read(tmp_path / name)
        assert {row["text"] for row in rows} == set(TEXTS)
        assert {row["id"] for row in rows} == {None}
        assert not rejected
        with pytest.raises(InputError, match="has no id column 'id'"):
            read(tmp_path / name, row_id="id")
    frame.rename_axis(5).to_parquet(tmp_path / "number.parquet")
    assert len(read(tmp_path / "number.parquet")[0]) == 30


def test_class_labels_are_kept_by_name(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        rows, _ = read(tmp_path / name, keep=["label"])
        assert [row["kept.label"] for row in rows] == ["pos", "neg", None]


def test_timestamps_of_spark_may_lie_in_any_year(tmp_path):
    years = [datetime(year, 1, 2, 3, 4, 5, 678901) for year in (1, 1582, 1969, 2026, 9999)]
    table = pa.table({"text": TEXTS[:5], "at": pa.array(years, pa.timestamp("us"))})
    nested = pa.array([{"at": year} for year in years], pa.struct({"at": pa.timestamp("us")}))
    table = table.append_column("also", nested)
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, use_deprecated_int96_timestamps=True)
    assert pq.ParquetFile(path).schema.column(1).physical_type == "INT96"
    rows, _ = read(path, keep=("at", "also", "also.at"))
    assert [row["kept.at"] for row in rows] == years
    assert [row["kept.also"]["at"] for row in rows] == years
    assert [row["kept.also.at"] for row in rows] == years


def test_folders_named_key_equals_value_are_columns(tmp_path):
    duckdb.execute(
        f"""COPY (SELECT i AS id, 'Text number ' || i AS text, ['cat', 'a/b=c', NULL][1 + i % 3]
        AS label FROM range(30) t(i)) TO '{tmp_path}/t' (FORMAT parquet, PARTITION_BY (label))"""
    )
    rows, _ = read(tmp_path / "t", keep=["label"])
    assert {row["id"]: row["kept.label"] for row in rows} == {
        str(n): ["cat", "a/b=c", None][n % 3] for n in range(30)
    }
    (tmp_path / "j" / "lang=en").mkdir(parents=True)
    (tmp_path / "j" / "lang=en" / "a.jsonl").write_text(LINES)
    rows, _ = read(tmp_path / "j", keep=["lang"])
    assert {row["kept.lang"] for row in rows} == {"en"}


def test_only_folders_below_the_corpus_are_columns(tmp_path):
    corpus = tmp_path / "id=7" / "corpus"
    (corpus / "lang=en").mkdir(parents=True)
    (corpus / "lang=en" / "a.jsonl").write_text('{"text": "t"}\n{"text": "u"}\n')
    (corpus / "lang=en" / "b.csv").write_text("text,n\nv,1\n")
    for path in (corpus, f"{corpus}/", f"{corpus}/*", f"{corpus}/lang=*/*"):
        rows, rejected = read(path, keep=["lang"])
        assert [(row["id"], row["text"], row["kept.lang"]) for row in rows] == [
            (None, text, "en") for text in "tuv"
        ]
        assert not rejected
    with pytest.raises(InputError, match="no kept column 'lang'"):
        read(corpus / "lang=en" / "a.jsonl", keep=["lang"])


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_text_can_be_the_name_of_a_folder(tmp_path, form):
    folder = tmp_path / "text=some words"
    folder.mkdir()
    if form == "parquet":
        pq.write_table(pa.table({"id": ["a", "b"]}), folder / "a.parquet")
    else:
        lines = {"csv": 'id,x\na,"1"\nb,"2"\n', "jsonl": '{"id": "a"}\n{"id": "b"}\n'}
        (folder / f"a.{form}").write_text(lines[form])
    assert ids_and_texts(tmp_path) == {"a": "some words", "b": "some words"}


def test_a_first_file_of_nothing_but_nulls_and_a_column_that_one_file_lacks(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": pa.nulls(1)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"], "label": ["x"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "c.parquet")
    rows, _ = read(tmp_path, keep=["label"])
    assert [row["kept.label"] for row in rows] == [None, "x", None]


@pytest.mark.parametrize(
    "value",
    [5, 1.5, datetime(2026, 1, 2), [1, 2], {"a": 1}, {"a": [{"b": "x"}]}],
    ids=str,
)
def test_nulls_in_one_file_take_the_type_that_another_has(tmp_path, value):
    def emptied(value):
        if isinstance(value, dict):
            return {name: emptied(inner) for name, inner in value.items()}
        return [] if isinstance(value, list) else None

    for name, some in (("a", None), ("b", emptied(value)), ("c", value)):
        pq.write_table(pa.table({"text": [name], "k": pa.array([some])}), tmp_path / f"{name}.pq")
    rows, _ = read(tmp_path, keep=["k"])
    assert [row["kept.k"] for row in rows] == [None, emptied(value), value]


# ---- containers


def test_save_to_disk_is_read_without_its_caches(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    with pa.OSFile(str(tmp_path / "saved" / "cache-1.arrow"), "wb") as sink:
        table = pa.Table.from_pylist(ROWS)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert ids_and_texts(tmp_path / "saved") == EXPECTED
    assert ids_and_texts(f"{tmp_path}/saved/*.arrow") == EXPECTED
    (alone,) = find_files(f"{tmp_path}/saved/cache-1.arrow")
    assert alone.path.endswith("cache-1.arrow")


@pytest.mark.parametrize("kind", ["file", "stream", "polars"])
def test_arrow_files_and_streams(tmp_path, kind):
    table = pa.Table.from_pylist(ROWS)
    if kind == "polars":
        pl.DataFrame(ROWS).write_ipc(tmp_path / "a.arrow", compression="zstd")
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    assert ids_and_texts(tmp_path) == EXPECTED


def test_a_lance_dataset_without_its_deleted_rows_at_any_version(tmp_path):
    dataset = lance.write_dataset(pa.Table.from_pylist(ROWS), str(tmp_path / "docs.lance"))
    dataset.delete("id < 3")
    remaining = {key: text for key, text in EXPECTED.items() if int(key) >= 3}
    assert ids_and_texts(tmp_path / "docs.lance") == remaining
    assert ids_and_texts(tmp_path) == remaining
    assert ids_and_texts(tmp_path / "docs.lance", version="1") == EXPECTED
    with pytest.raises(InputError, match="cannot read 9"):
        find_files(str(tmp_path / "docs.lance"), CorpusOptions(version="9"))


@pytest.mark.parametrize("version", ["2.0", "2.2"])
def test_blobs_of_lance_are_not_kept_as_their_places(tmp_path, version):
    blob = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    schema = pa.schema([("id", pa.int64()), ("text", pa.string()), blob])
    table = pa.table([[1, 2], ["one", "two"], [b"x", b"y"]], schema=schema)
    lance.write_dataset(table, tmp_path / "a.lance", data_storage_version=version)
    assert len(ids_and_texts(tmp_path)) == 2
    with pytest.raises(InputError, match=r"'image' of .* holds blobs of Lance"):
        read(tmp_path, keep=("image",))


def test_a_lance_dataset_of_another_name_is_told(tmp_path):
    lance.write_dataset(pa.Table.from_pylist(ROWS), tmp_path / "docs")
    with pytest.raises(InputError, match=r"a Lance dataset, whose folder must be named NAME.lance"):
        find_files(str(tmp_path / "docs"))


def test_a_table_without_a_row_is_said_to_be_one(tmp_path):
    write_deltalake(str(tmp_path / "t"), pa.table({"id": [1], "text": ["a"]}))
    DeltaTable(str(tmp_path / "t")).delete()
    with pytest.raises(InputError, match="t is a table without a row"):
        find_files(str(tmp_path / "t"))


def test_a_wet_file_gives_a_document_a_record(tmp_path):
    records = [b"WARC/1.0\r\nWARC-Type: warcinfo\r\nContent-Length: 3\r\n\r\nabc\r\n\r\n"]
    for number in range(3):
        body = f"Page {number}\nsecond line\n".encode()
        records.append(
            b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://example.org/%d\r\n"
            b"WARC-Identified-Content-Language: eng\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
            % (number, len(body), body)
        )
    path = tmp_path / "CC-MAIN.warc.wet.gz"
    path.write_bytes(b"".join(gzip.compress(record) for record in records))
    rows, _ = read(tmp_path, keep=["language"])
    assert [row["id"] for row in rows] == [f"http://example.org/{n}" for n in range(3)]
    assert rows[1]["text"] == "Page 1\nsecond line\n"
    assert {row["kept.language"] for row in rows} == {"eng"}
    path.write_bytes(path.read_bytes()[:-25])
    (file,) = inspect_files(find_files(str(tmp_path)), Columns(), shard_bytes=1 << 20)
    with pytest.raises(OSError):
        list(read_shard(file.shards()[0], Columns()))


def test_a_file_can_be_a_document(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.md").write_text("# Title\n\nOne text.\n")
    (tmp_path / "sub" / "b.txt").write_text("Another\nof two lines\n")
    assert ids_and_texts(tmp_path, text_unit="file") == {
        "a.md": "# Title\n\nOne text.\n",
        "sub/b.txt": "Another\nof two lines\n",
    }


def test_the_id_of_a_file_is_its_path_below_the_corpus_however_that_is_written(tmp_path, s3_server):
    s3_server.create_bucket(Bucket="shoal-texts")
    for folder in ("x", "y"):
        (tmp_path / "docs[1]" / folder).mkdir(parents=True)
        (tmp_path / "docs[1]" / folder / "readme.md").write_text(folder)
        s3_server.put_object(
            Bucket="shoal-texts", Key=f"docs/{folder}/readme.md", Body=folder.encode()
        )
    expected = {"x/readme.md": "x", "y/readme.md": "y"}
    local, remote = f"{tmp_path}/docs[1]", "s3://shoal-texts/docs"
    for corpus in (local, f"{local}/", remote, f"{remote}/", f"{remote}/*"):
        assert ids_and_texts(corpus, text_unit="file") == expected, corpus
    assert ids_and_texts(f"{local}/x/readme.md", text_unit="file") == {"readme.md": "x"}


@pytest.mark.parametrize("unit", ["line", "file"])
def test_a_kept_column_of_a_folder_is_null_for_texts_beside_it(tmp_path, unit):
    (tmp_path / "lang=en").mkdir()
    for folder in (tmp_path, tmp_path / "lang=en"):
        (folder / "a.txt").write_text("words")
    rows, _ = read(tmp_path, keep=["lang", "text"], text_unit=unit)
    assert [(row["kept.lang"], row["kept.text"]) for row in rows] == [
        (None, "words"),
        ("en", "words"),
    ]


def test_a_document_is_read_by_its_byte_order_mark(tmp_path):
    (tmp_path / "a.md").write_bytes("ü".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes("ü".encode("utf-8-sig"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("ü".encode("utf-32")))
    (tmp_path / "d.txt").write_bytes("ü".encode("utf-16") + b"x")
    rows, rejected = read(tmp_path, text_unit="file")
    assert [row["text"] for row in rows] == ["ü"] * 3
    assert rejected == {"text is not valid UTF-8": 1}


def test_a_wet_file_that_is_cut_off_or_broken_is_told(tmp_path):
    headers = "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: {}\r\n\r\nwords\r\n\r\n"
    for length, cut, says in (("5x", 0, "Content-Length is '5x'"), ("5", 17, "are cut off")):
        content = headers.format(length).encode()
        (tmp_path / "a.wet").write_bytes(content[: len(content) - cut])
        (file,) = inspect_files(find_files(str(tmp_path)), Columns(), shard_bytes=1 << 20)
        with pytest.raises(OSError, match=says):
            list(read_shard(file.shards()[0], Columns()))


def test_a_folder_of_unreadable_kind_is_named(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(io.BytesIO(b"PK").read())
    with pytest.raises(InputError, match=r"a\.xlsx: unknown format"):
        find_files(str(tmp_path / "a.xlsx"))


def test_what_was_detected_is_told_by_kind_of_file_with_sample_rows(tmp_path):
    (tmp_path / "lang=en").mkdir()
    (tmp_path / "lang=en" / "a.jsonl").write_text(LINES)
    (tmp_path / "b.csv").write_text("id;text\n1;one\n2;\n")
    pq.write_table(
        pa.table({"text": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "c.parquet"
    )
    (tmp_path / "d.xlsx").write_text("x")
    (tmp_path / "e.jsonl.gz").write_text("")
    listing = find_corpus(str(tmp_path))
    files = inspect_files(listing.files, Columns(), shard_bytes=1 << 20)
    table = describe_corpus(files, Columns(), listing.passed_over)
    assert table["jsonl"] == "1 files; columns id, text; by its place: lang"
    assert table["jsonl, row 1"] == "0: Text number 0"
    assert table["csv fields parted by ';', quoted with \", row 2"] == "rejected: text is empty"
    assert table["parquet"].startswith("1 files; columns text string, n int32; 1 without an id")
    assert table[f"unreadable {tmp_path}/e.jsonl.gz"] == "the file is empty"
    assert table["passed over: unknown format"] == f"1 files, such as {tmp_path}/d.xlsx"


def test_the_version_of_a_table_is_among_what_was_detected(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    write_deltalake(str(tmp_path / "in" / "t"), table)
    DeltaTable(str(tmp_path / "in" / "t")).delete("id = 0")
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    lance.write_dataset(table, tmp_path / "a.lance")

    def told(name, version=""):
        asked = CorpusOptions(version=version)
        found = find_files(str(tmp_path / name), asked)
        files = inspect_files(found, Columns(), shard_bytes=1 << 20)
        return describe_corpus(files, Columns(), {})

    assert told("in")["parquet of Delta version 1, row 1"] == "1: Text number 1"
    assert told("in")["parquet, row 1"] == "0: Text number 0"
    assert told("in", "0")["parquet of Delta version 0, row 1"] == "0: Text number 0"
    assert told("a.lance")["lance version 1, row 1"] == "0: Text number 0"


def test_long_integers_beside_fractions_lose_no_digit(tmp_path):
    long = 2**60 + 1
    lines = [f'{{"text": "a", "n": {long}}}', '{"text": "b", "n": 0.5}', '{"text": "c", "n": 7}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows, _ = read(tmp_path, keep=("n",))
    assert [row["kept.n"] for row in rows] == [str(long), "0.5", "7"]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], lines[2]]))
    rows, _ = read(tmp_path, keep=("n",))
    assert [row["kept.n"] for row in rows] == [long, 7]
    (tmp_path / "a.jsonl").unlink()
    for name, values in (("a", [long]), ("b", [0.5])):
        pq.write_table(pa.table({"text": ["x"], "n": values}), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match="'n' is int64 in one file and double in others, which do"):
        read(tmp_path, keep=("n",))


def test_integers_beyond_64_bits_keep_all_their_digits(tmp_path):
    big = 123456789012345678901
    (tmp_path / "a.jsonl").write_text(
        f'{{"id": {big}, "text": "a", "n": [{big}]}}\n{{"id": 1, "text": "b", "n": NaN}}\n'
    )
    rows, rejected = read(tmp_path, keep=["n"])
    assert [row["id"] for row in rows] == [str(big), "1"]
    assert rows[0]["kept.n"] == f"[{big}]"
    assert not rejected


def test_documents_and_pairs_without_a_time_of_change_are_told_apart_by_their_etags(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/marked/pairs.jsonl", b'{"anchor": "a", "positive": "b", "text": "c"}\n')
    plain, listings = type(memory).info, []
    for tag in ("one", "one", "two"):
        monkeypatch.setattr(type(memory), "info", lambda *a, t=tag: {**plain(*a), "ETag": t})
        (file,) = find_files("memory://marked")
        (seen,) = inspect_files([file], Columns(), shard_bytes=1 << 20)
        (shard,) = [shard.name for shard in seen.shards()]
        pairs = list_pair_files("memory://marked")
        listings.append((listing_of([file]), shard, pairs))
    first, same, other = listings
    assert first == same
    assert all(one != two for one, two in zip(first, other, strict=True))
