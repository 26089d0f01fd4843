"""Blocks of CSV and TSV give the rows that Python's csv gives one by one."""

import gzip
import io
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.corpus import delimited_blocks
from pipelines.corpus.delimited import BadRow, check_row, parse_rows
from pipelines.corpus.delimited_blocks import read_blocks
from pipelines.corpus.files import CorpusFile, Dialect

QUOTED, SPARK = Dialect(",", '"', ""), Dialect(",", '"', "\\")
PLAIN, COPY = Dialect("\t", "", ""), Dialect("\t", "", "\\")


def file_of(path, dialect, columns, newline="\n", compression=None):
    size = Path(path).stat().st_size
    names = tuple(columns)
    return CorpusFile(
        str(path), size, 0, "csv", compression, columns=names, dialect=dialect, newline=newline
    )


def by_blocks(file, wanted):
    """(rows, how many of them came in tables); of bad rows what they say."""
    rows, in_tables = [], 0
    places = [file.columns.index(name) for name in wanted]
    for found in read_blocks(file, wanted):
        if isinstance(found, pa.Table):
            values = found.to_pydict().values()
            rows += [
                tuple(f.decode("utf-8", "surrogateescape") for f in row)
                for row in zip(*values, strict=True)
            ]
            in_tables += len(found)
        elif isinstance(found, BadRow):
            rows.append(found)
        else:
            rows.append(tuple(found[place] for place in places))
    return rows, in_tables


def one_by_one(file, wanted):
    """The same by Python's csv alone."""
    places = [file.columns.index(name) for name in wanted]
    newline = "" if file.dialect.quote else file.newline
    raw = io.BytesIO(Path(file.path).read_bytes())
    lines = io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline=newline)
    parsed = parse_rows(lines, file.dialect)
    if not file.dialect.header:
        next(parsed, None)
    checked = (check_row(row, len(file.columns), file.dialect.delimiter) for row in parsed)
    return [r if isinstance(r, BadRow) else tuple(r[p] for p in places) for r in checked]


MARKS = [
    "a",
    "b",
    '"',
    ",",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\\",
    "\\N",
    " ",
    "ü",
    "\0",
    "\udcff",
    "\ufeff",
]
PARTS = ['""', ',"', '",', '"\n', 'x,"y"\n', "1,2\n", "1\t2\n", '"a\n\n\nb",c\n', '"a ""b""",c\r\n']


@settings(max_examples=600)
@example(
    pieces=["1,2\n"] * 3 + ['"a\n', "1,2\n", "1,2\n", "1,2\n", "1,2\n", 'b",c\n'],
    dialect=QUOTED,
    size=9,
    newline="\n",
)
@given(
    pieces=st.lists(st.sampled_from([*MARKS, *PARTS]), max_size=40),
    dialect=st.sampled_from(
        [
            *(QUOTED, SPARK, PLAIN, COPY),
            *(Dialect(",", "'", ""), Dialect("é", '"', "")),
            *(Dialect(",", "a", "\\"), Dialect(",", '"', "b"), Dialect("\t", "", "b")),
        ]
    ),
    size=st.integers(3, 30),  # no less than a byte order mark
    newline=st.sampled_from(["\n", "\n", "\r"]),
)
def test_any_text_gives_the_rows_of_python_s_csv(pieces, dialect, size, newline):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited_blocks, "BLOCK_BYTES", size)
        patch.setattr(delimited_blocks, "_MOST_BYTES", 3 * size)
        patch.setattr(delimited_blocks, "_CACHED_BYTES", max(16, size // 2))
        path = Path(folder, "a.csv")
        path.write_bytes("".join(pieces).encode("utf-8", "surrogateescape"))
        for columns in (("x", "y"), ("x", "y", "z"), ("x",)):
            file = file_of(path, dialect, columns, newline)
            for wanted in (columns, columns[-1:]):
                assert by_blocks(file, wanted)[0] == one_by_one(file, wanted)


def test_sound_rows_come_in_tables_and_a_broken_one_costs_its_block_only(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited_blocks, "BLOCK_BYTES", 1000)
    texts = [
        random.Random(n).choice(["plain", "two\nlines", 'a "b", c']) + f" {n}" for n in range(900)
    ]
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    lines = [f"{n},{text}\n" for n, text in enumerate(quoted)]
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(lines))
    file = file_of(path, QUOTED, ("id", "text"))
    rows, in_tables = by_blocks(file, ("id", "text"))
    assert rows == [(str(n), text) for n, text in enumerate(texts)]
    assert in_tables == 900
    lines[500] = '500,"a"b\n'
    path.write_text("id,text\n" + "".join(lines))
    rows, in_tables = by_blocks(file, ("id", "text"))
    at = 2 + sum(line.count("\n") for line in lines[:500])
    assert rows[500] == BadRow(at, "malformed CSV row: ',' expected after '\"'")
    assert len(rows) == 900
    assert in_tables > 800


def test_all_rows_before_the_place_where_a_file_is_cut_are_read(tmp_path):
    lines = "".join(f'{n},"text {n} {random.Random(n).random()}"\n' for n in range(60_000))
    packed = gzip.compress(("id,text\n" + lines).encode())
    path = tmp_path / "a.csv.gz"
    path.write_bytes(packed[: len(packed) // 2])
    seen = 0
    with pytest.raises(OSError):
        for found in read_blocks(
            file_of(path, QUOTED, ("id", "text"), compression="gzip"), ("id",)
        ):
            seen += len(found) if isinstance(found, pa.Table) else 1
    assert 20_000 < seen < 31_000
