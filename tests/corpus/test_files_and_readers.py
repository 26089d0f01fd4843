"""Finding, checking and reading the files of a corpus: no Ray, no model."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from writers import write_arrow

from pipelines.corpus import streams
from pipelines.corpus.columnar import BATCH_BYTES
from pipelines.corpus.documents import Checker, check_id, check_text, read_documents
from pipelines.corpus.files import Columns, CorpusOptions, Shard, find_corpus, find_files
from pipelines.corpus.kept_columns import (
    json_to_values,
    parquet_schema,
    resolve_type,
    values_to_json,
)
from pipelines.corpus.readers import RowBatch, inspect_files, read_shard
from pipelines.runtime.errors import InputError


def inspected(corpus: Path | str, columns: Columns | None = None, shard_bytes: int = 1 << 20):
    return inspect_files(find_files(str(corpus)), columns or Columns(), shard_bytes=shard_bytes)


def rows_of(corpus: Path | str, columns: Columns | None = None, shard_bytes: int = 1 << 20):
    """(text, id, problem) of every row of a corpus, in order."""
    columns = columns or Columns()
    found = []
    for file in inspected(corpus, columns, shard_bytes):
        for shard in file.shards():
            for batch in read_shard(shard, columns):
                ids = batch.ids if batch.ids is not None else [None] * len(batch.texts)
                found += zip(batch.texts, ids, batch.problems, strict=True)
    return found


def texts_of(corpus: Path | str, **kwargs):
    plain = [text for text, _, _ in rows_of(corpus, **kwargs)]
    return [t.decode() if isinstance(t, bytes) else t for t in plain]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# ---- which files


def test_a_missing_path_is_named():
    with pytest.raises(InputError, match=r"no such file or folder: /nowhere/docs\.parquet"):
        find_files("/nowhere/docs.parquet")


def test_a_glob_without_a_match_names_the_glob(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "x"}\n')
    with pytest.raises(InputError, match=r"no file of a known format at .*\*\.csv"):
        find_files(f"{tmp_path}/*.csv")


def test_a_file_of_unknown_format_tells_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"known format.*\.parquet"):
        find_files(str(write(tmp_path / "a.xlsx", "x")))


def test_a_folder_is_read_recursively_in_order_without_hidden_and_unknown_files(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    (tmp_path / "_work").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "_work/d.txt", "README.md"):
        write(tmp_path / name, name)
    assert texts_of(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert "not read: 1 files of unknown format" in caplog.text
    assert "README.md" in caplog.text


def test_a_folder_called_like_a_file_is_searched_where_a_glob_matches_it(tmp_path):
    (tmp_path / "b.txt").mkdir()
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "b.txt" / "part-0.txt", "second")
    assert texts_of(f"{tmp_path}/*.txt") == ["first", "second"]


# ---- what is in them


def test_every_format_gives_the_same_documents(tmp_path):
    texts = ["first", 'with "quotes", commas', "tab\there", "ünï → 文"]
    ids = ["a", "b", "c", "d"]
    lines = "".join(
        json.dumps({"id": i, "text": t}) + "\n" for i, t in zip(ids, texts, strict=True)
    )
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "a.ndjson.gz", lines)
    pq.write_table(pa.table({"id": ids, "text": texts}), tmp_path / "a.parquet")
    quoted = ['"' + t.replace('"', '""') + '"' for t in texts]
    for delimiter, name in ((",", "a.csv"), ("\t", "a.tsv"), (",", "b.csv.gz")):
        rows = [delimiter.join(pair) for pair in zip(ids, quoted, strict=True)]
        write(tmp_path / name, "\ufeff" + "\r\n".join([delimiter.join(["id", "text"]), *rows]))
    write(tmp_path / "a.txt", "\n".join(texts) + "\n")
    for name in ("a.jsonl", "a.ndjson.gz", "a.parquet", "a.csv", "a.tsv", "b.csv.gz", "a.txt"):
        assert texts_of(tmp_path / name) == texts, name
    assert [row[1].decode() for row in rows_of(tmp_path / "a.csv")] == ids


def test_a_missing_column_names_the_columns_there_are(tmp_path):
    pq.write_table(pa.table({"key": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no text column 'text'; its columns are key, body"):
        inspected(tmp_path)
    with pytest.raises(InputError, match=r"no id column 'nr'; its columns are key, body"):
        inspected(tmp_path, Columns("body", "nr"))
    with pytest.raises(InputError, match=r"no kept column 'label'"):
        inspected(tmp_path, Columns("body", "key", ("label",)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_missing_column_is_found_in_line_formats_too(tmp_path, name):
    write(tmp_path / name, '{"body": "x"}\n' if name == "a.jsonl" else "body,key\nx,1\n")
    with pytest.raises(InputError, match="no text column 'text'; its columns are body"):
        inspected(tmp_path)


def test_files_that_cannot_be_looked_into_keep_their_problem(tmp_path):
    write(tmp_path / "a.parquet", "not parquet at all")
    (tmp_path / "b.jsonl.gz").touch()
    (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip")
    problems = [file.problem for file in inspected(tmp_path)]
    assert all(problems)
    assert problems[1] == "the file is empty"
    assert not any(shard for file in inspected(tmp_path) for shard in file.shards())


@pytest.mark.parametrize("name", ["part.jsonl", "part.json", "part.csv", "part.tsv", "part.txt"])
def test_an_empty_file_among_others_holds_no_row(tmp_path, name):
    write(tmp_path / name, "")
    (alone,) = inspected(tmp_path)
    assert alone.problem == "the file is empty"
    write(tmp_path / "b.jsonl", '{"text": "a"}')
    assert texts_of(tmp_path) == ["a"]
    assert find_corpus(str(tmp_path)).passed_over == {str(tmp_path / name): "0 bytes"}


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n", b"\r\n\r\n"])
@pytest.mark.parametrize("name", ["part.csv.gz", "part.tsv"])
def test_csv_without_a_line_holds_no_row(tmp_path, name, content, caplog):
    write(tmp_path / name, content or b"\n")
    (alone,) = inspected(tmp_path)
    assert alone.problem == "the file is empty"
    write(tmp_path / name, content)
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "b.parquet")
    columns = Columns(keep=("n",))
    files = inspected(tmp_path, columns)
    assert not [file.problem for file in files if file.problem]
    assert texts_of(tmp_path, columns=columns) == ["a"]
    assert parquet_schema(files, ("n",)).field("n").type == pa.int64()
    assert f"{tmp_path}/{name}" in caplog.text


def test_a_file_that_is_a_document_and_empty_is_rejected_alone(tmp_path):
    write(tmp_path / "a.md", "")
    write(tmp_path / "b.md", "words")
    options = CorpusOptions(text_unit="file")
    files = inspect_files(
        find_files(str(tmp_path), options), Columns(), shard_bytes=1 << 20, options=options
    )
    left_out = Counter()
    shards = [shard for file in files for shard in file.shards()]
    found = [document for s in shards for document in read_documents(s, Columns(), left_out)]
    assert [document.id for document in found] == ["b.md"]
    assert left_out == {"text is empty": 1}


def test_malformed_rows_keep_their_place_and_say_why(tmp_path):
    write(
        tmp_path / "a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n[1]\n\n{"text"\n{"text": "end"}'
    )
    assert [problem for _, _, problem in rows_of(tmp_path / "a.jsonl")] == [
        None,
        "line is not valid UTF-8",
        "JSON line is not an object",
        "blank line",
        "malformed JSON line",
        None,
    ]
    write(tmp_path / "a.csv", 'id,text\n1,ok\n2\n3,"a"b\n4,end\n')
    problems = [problem for _, _, problem in rows_of(tmp_path / "a.csv")]
    assert problems[0] is problems[3] is None
    assert problems[1] == "row has 1 fields, the header has 2"
    assert problems[2].startswith("malformed CSV row")


def test_an_unclosed_quote_tells_how_many_lines_it_swallowed(tmp_path):
    write(tmp_path / "a.csv", 'text\nok\n"never closed\n' + "x\n" * 100)
    rows = rows_of(tmp_path / "a.csv")
    assert len(rows) == 102  # what it swallowed counts as rejected, line by line
    assert all("over 101 lines" in row[2] for row in rows[1:])


def test_a_line_that_is_too_long_is_one_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr(streams, "BLOCK_BYTES", 256)
    write(tmp_path / "a.txt", "short\n" + "x" * 5000 + "\nend\n")
    found = rows_of(tmp_path / "a.txt")
    assert [row[2] is None for row in found] == [True, False, True]


@settings(max_examples=60)
@given(
    lines=st.lists(
        st.text(st.characters(exclude_characters="\n\r\ufeff"), max_size=30), min_size=1
    ),
    shard_bytes=st.integers(1, 60),
    ended=st.booleans(),
)
def test_shards_of_any_size_give_every_line_once(tmp_path_factory, lines, shard_bytes, ended):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(("\n".join(lines) + "\n" * ended).encode("utf-8", "surrogatepass"))
    expected = lines if lines[-1] or ended else lines[:-1]
    if not path.stat().st_size:
        return
    found = rows_of(path, shard_bytes=shard_bytes)
    assert [row[0].decode("utf-8", "surrogatepass") for row in found] == expected


def test_parquet_shards_follow_row_groups(tmp_path):
    table = pa.table({"text": [f"text {i}" * 50 for i in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    (file,) = inspected(tmp_path, shard_bytes=20_000)
    assert len(file.shards()) > 3
    assert texts_of(tmp_path, shard_bytes=20_000) == table["text"].to_pylist()


def test_an_arrow_file_without_a_record_batch_has_no_row(tmp_path):
    table = pa.table({"text": pa.array([], pa.string())})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema):
        pass
    assert texts_of(tmp_path) == []
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(pa.table({"text": ["one"]}))
    assert texts_of(tmp_path) == ["one"]


def test_a_large_arrow_file_is_read_in_large_batches(tmp_path):
    texts = [f"text {number} " * 100 for number in range(10_000)]
    write_arrow(tmp_path, pa.table({"text": texts}), 20_000)
    (file,) = inspected(tmp_path)
    assert file.size_bytes > BATCH_BYTES
    sizes = [len(batch.texts) for batch in read_shard(file.shards()[0], Columns())]
    assert sizes == [4096, 4096, 1808]
    assert texts_of(tmp_path) == texts


def test_a_shard_is_named_by_the_state_of_its_file(tmp_path):
    write(tmp_path / "a.txt", "one\n")
    before = inspected(tmp_path)[0].shards()[0].name
    write(tmp_path / "a.txt", "two!\n")
    assert inspected(tmp_path)[0].shards()[0].name != before


def test_what_could_be_read_of_a_truncated_file_is_kept(tmp_path):
    data = gzip.compress(b"".join(b'{"text": "line %d"}\n' % i for i in range(200_000)))
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-200])
    (file,) = inspected(tmp_path)
    seen = 0
    with pytest.raises(OSError, match="Truncated"):
        for batch in read_shard(Shard(file, 0, 1), Columns()):
            seen += len(batch.texts)
    assert seen > 100_000


# ---- checks and kept columns


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("fine", None),
        (b"fine", None),
        (None, "text is null"),
        ("", "text is empty"),
        (" \n\t\u00a0", "text is empty"),
        (7, "text is an integer, not a string"),
        (True, "text is a boolean, not a string"),
        (["a"], "text is a list, not a string"),
        ({"a": 1}, "text is an object, not a string"),
        (b"\xff\xfe", "text is not valid UTF-8"),
        ("\ud800", "text is not valid UTF-8"),
    ],
)
def test_text_checks(found, reason):
    assert check_text(found)[2] == reason


@pytest.mark.parametrize(
    ("found", "row_id", "reason"),
    [
        ("a", "a", None),
        (b"a", "a", None),
        (12, "12", None),
        (None, None, "id is null"),
        ("", None, "id is empty"),
        (1.5, None, "id is a float, not a string or an integer"),
        (False, None, "id is a boolean, not a string or an integer"),
        ("\udfff", None, "id is not valid UTF-8"),
    ],
)
def test_id_checks(found, row_id, reason):
    assert check_id(found) == (row_id, reason)


def test_a_parquet_file_with_invalid_utf8_loses_only_that_row(tmp_path):
    bad = pa.array([b"good", b"\xff\xfe", b"also good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": [1, 2, 3], "text": bad}), tmp_path / "a.parquet")
    (file,) = inspected(tmp_path)
    checker = Checker((), pa.schema([]), 1000)
    (batch,) = read_shard(file.shards()[0], Columns())
    accepted, rejected = checker.check(batch)
    assert accepted["text"].to_pylist() == ["good", "also good"]
    assert rejected["id"].to_pylist() == ["2"]
    assert checker.reasons == {"text is not valid UTF-8": 1}


@pytest.mark.parametrize("beside", [False, True])
def test_invalid_utf8_within_a_kept_column_costs_no_row(tmp_path, beside):
    raw = [{"tags": [b"good", b"\xff"], "n": 1}, {"tags": None, "n": 2}]
    kind = pa.struct([("tags", pa.list_(pa.string())), ("n", pa.int64())])
    about = pa.array(raw, pa.struct([("tags", pa.list_(pa.binary())), ("n", pa.int64())]))
    table = pa.table({"id": ["a", "b"], "text": ["t", "u"], "about": about.view(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    if beside:
        write(tmp_path / "b.jsonl", '{"id": "c", "text": "v", "about": null}\n')
    columns = Columns(keep=("about",))
    files = inspected(tmp_path, columns)
    checker = Checker(columns.keep, parquet_schema(files, columns.keep), 1000)
    shards = [shard for file in files for shard in file.shards()]
    tables = [checker.check(batch)[0] for s in shards for batch in read_shard(s, columns)]
    kept = [value for table in tables for value in table["kept.about"].to_pylist()]
    if beside:
        kept = [value and json.loads(value) for value in kept[:2]]
    assert kept == [{"tags": ["good", "\ufffd"], "n": 1}, {"tags": None, "n": 2}]


def test_values_that_python_does_not_hold_are_kept_beside_json_as_text(tmp_path):
    far = pa.array([0, 400_000 * 10**12], pa.timestamp("us"))
    within = pa.StructArray.from_arrays([far, pa.array([b"plain", b"b\xff"])], ["at", "raw"])
    columns = {"id": ["a", "b"], "text": ["t", "u"], "at": far, "both": within}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", '{"id": "c", "text": "v"}\n')
    wanted = Columns(keep=("at", "both"))
    (file, _) = inspected(tmp_path, wanted)
    checker = Checker(wanted.keep, None, 1000)
    (table,) = (checker.check(batch)[0] for batch in read_shard(file.shards()[0], wanted))
    times = ["1970-01-01 00:00:00", "14645-06-30 15:06:40.000000"]
    assert [json.loads(text) for text in table["kept.at"].to_pylist()] == times
    assert [json.loads(text) for text in table["kept.both"].to_pylist()] == [
        {"at": times[0], "raw": "plain"},
        {"at": times[1], "raw": "b\ufffd"},
    ]


def test_a_batch_that_cannot_be_read_is_not_counted():
    broken = pa.Array.from_buffers(
        pa.list_(pa.int8()),
        2,
        [None, pa.py_buffer(np.array([0, 9, 1], np.int32))],
        children=[pa.array([1], pa.int8())],
    )
    checker = Checker(("k",), pa.schema([("k", pa.list_(pa.int8()))]), 1000)
    batch = RowBatch(["a", "b"], [None, None], None, pa.table({"k": broken}))
    with pytest.raises(pa.ArrowInvalid):
        checker.check(batch)
    assert (checker.rows, checker.documents, checker.hashed_ids) == (0, 0, 0)
    assert not checker.id_kinds


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, 3], pa.int64()),
        ([1, 2.5, None], pa.float64()),
        ([True, None], pa.bool_()),
        (["a", None], pa.string()),
        (["a", 1, [2]], pa.string()),
        ([2**70], pa.string()),
        ([None], pa.null()),
    ],
)
def test_kept_values_find_a_type_that_holds_them_all(values, expected):
    kinds: set[str] = set()
    texts = pa.chunked_array([values_to_json(values, kinds)])
    found = json_to_values(texts, resolve_type(kinds))
    assert found.type == expected
    text = pa.types.is_string(expected)
    shown = [
        json.dumps(v) if text and v is not None and not isinstance(v, str) else v for v in values
    ]
    assert found.to_pylist() == shown


def test_kept_parquet_columns_keep_their_types(tmp_path):
    pq.write_table(
        pa.table({"text": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "a.parquet"
    )
    pq.write_table(
        pa.table({"text": ["b"], "n": pa.array([2], pa.int64())}), tmp_path / "b.parquet"
    )
    assert parquet_schema(inspected(tmp_path), ("n",)).field("n").type == pa.int64()
    pq.write_table(pa.table({"text": ["b"], "n": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet"):
        parquet_schema(inspected(tmp_path), ("n",))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_column_whose_name_holds_a_dot_is_read_whole(tmp_path, form):
    dotted = {"meta.lang": ["de", "en"], "doc": [{"lang": "fr", "n": 1}, {"lang": "it", "n": 2}]}
    table = pa.table({"id": ["a", "b"], "text": ["t", "u"], **dotted, "doc.lang": ["x", "y"]})
    if form == "parquet":
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    else:
        write_arrow(tmp_path, table, 1)
    columns = Columns("meta.lang", keep=("meta.lang", "doc.n", "doc.lang"))
    batches = [
        batch
        for file in inspected(tmp_path, columns)
        for shard in file.shards()
        for batch in read_shard(shard, columns)
    ]
    assert [text for batch in batches for text in batch.texts] == [b"de", b"en"]
    assert [row for batch in batches for row in batch.kept.to_pylist()] == [
        {"meta.lang": "de", "doc.n": 1, "doc.lang": "x"},
        {"meta.lang": "en", "doc.n": 2, "doc.lang": "y"},
    ]
