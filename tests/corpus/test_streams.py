"""Lines of text files: whole or by shards, whatever the blocks that they come in."""

import bz2
import gzip
import itertools
import lzma
import tracemalloc

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.corpus import streams
from pipelines.corpus.streams import open_stream, split_lines

BLOCK, LONGEST = 7, 12
LINES = st.lists(st.text("ab\r", max_size=20).map(str.encode), max_size=12)


def expected(content: bytes) -> list[bytes | None]:
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    sizes = [len(line) + 1 for line in lines]
    if lines and not content.endswith(b"\n"):
        sizes[-1] -= 1
    return [
        None if size > LONGEST else line.removesuffix(b"\r")
        for line, size in zip(lines, sizes, strict=True)
    ]


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    lines=LINES,
    ended=st.booleans(),
    marked=st.booleans(),
    cuts=st.sets(st.integers(1, 150), max_size=4),
)
def test_shards_hold_every_line_once(tmp_path, monkeypatch, lines, ended, marked, cuts):
    monkeypatch.setattr(streams, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(streams, "LONGEST_LINE_BYTES", LONGEST)
    content = b"\n".join(lines) + (b"\n" if ended else b"")
    wanted = expected(content)
    if marked and wanted and wanted[0] is not None and len(wanted[0]) <= LONGEST - 5:
        content = b"\xef\xbb\xbf" + content
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    found = [
        line
        for start, stop in itertools.pairwise(bounds)
        for line in split_lines(str(path), None, start=start, stop=stop)
    ]
    assert found == wanted
    assert list(split_lines(str(path), None)) == wanted
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    assert list(split_lines(str(tmp_path / "a.txt.gz"), "gzip")) == wanted


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\n", b"a"])
def test_empty_files_and_lines(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    found = split_lines(str(tmp_path / "a.txt"), None, start=0, stop=len(content))
    assert list(found) == expected(content)


PACK = {
    "gzip": gzip.compress,
    "bz2": lambda content: bz2.compress(content, 1),
    "xz": lzma.compress,
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize("compression", PACK)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    pieces=st.lists(st.binary(max_size=300) | st.just(b"a" * 500), min_size=1, max_size=4),
    step=st.integers(1, 40),
    cut=st.integers(1, 60),
)
def test_packed_pieces_of_any_size_come_back_and_a_cut_loses_little(
    tmp_path, monkeypatch, compression, pieces, step, cut
):
    monkeypatch.setattr(streams, "BLOCK_BYTES", step)
    monkeypatch.setattr(streams, "_PACKED_BYTES", step)
    packed, content = b"".join(map(PACK[compression], pieces)), b"".join(pieces)
    path = tmp_path / "a"
    path.write_bytes(packed)
    with open_stream(str(path), compression) as stream:
        assert b"".join(iter(lambda: stream.read(step), b"")) == content
    last = len(PACK[compression](pieces[-1]))
    path.write_bytes(packed[: -min(cut, last - 1)])
    got = b""
    with open_stream(str(path), compression) as stream, pytest.raises(OSError):
        while block := stream.read1(step):
            got += block
    assert content.startswith(got)
    assert len(got) >= len(content) - len(pieces[-1])


@pytest.mark.parametrize("compression", PACK)
def test_what_packs_very_well_is_unpacked_in_small_steps(tmp_path, compression):
    path = tmp_path / "a"
    path.write_bytes(PACK[compression](b"a line like all others\n" * (2 << 20)))
    tracemalloc.start()
    lines = sum(1 for _ in split_lines(str(path), compression))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lines == 2 << 20
    assert peak < 20 << 20
