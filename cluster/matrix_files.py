"""Files that hold vectors and no columns: NumPy, fvecs, fbin and FAISS indexes.

In: a path on a filesystem. Out: how many vectors of which dimension it holds, and its rows in
order with their ids: numbers from 0, or those that the file has.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow.fs as pafs

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import first_line
from pipelines.runtime.machines import require_memory

_VECS: dict[str, np.dtype[Any]] = {
    ".fvecs": np.dtype("<f4"),
    ".ivecs": np.dtype("<i4"),
    ".bvecs": np.dtype("u1"),
}
_BINS: dict[str, np.dtype[Any]] = {
    ".fbin": np.dtype("<f4"),
    ".i8bin": np.dtype("i1"),
    ".u8bin": np.dtype("u1"),
}
_INDEXES = (".faiss", ".index")
_ZIP_LENGTHS = 26
"""Where a zip archive's header of a file says how long its last two parts are."""
MATRIX_SUFFIXES = (".npy", ".npz", *_VECS, *_BINS, *_INDEXES)

Rows = tuple[np.ndarray, np.ndarray]
"""Ids, int64, uint64 or str (n,), and vectors, float32 (n, d)."""


@dataclass(frozen=True)
class Matrix:
    """The vectors of one file; ``read(start, stop, block_rows)`` gives some of them in blocks."""

    rows: int
    dimension: int
    read: Callable[[int, int, int], Iterator[Rows]]
    ids: np.ndarray | None = None
    """The file's own ids; None where rows are numbered."""
    sequential: bool = False
    """Whether reading a part costs as much as reading all before it."""


def open_matrix(filesystem: pafs.FileSystem, path: str) -> Matrix:
    """The vectors of a file.

    Raises :class:`InputError` for a file that is not what its name says, or holds no matrix.
    """
    suffix = "." + path.rpartition(".")[2]
    try:
        if suffix == ".npy":
            return _numpy_matrix(filesystem, path)
        if suffix == ".npz":
            return _numpy_archive(filesystem, path)
        if suffix in _INDEXES:
            return _faiss_index(filesystem, path)
        return _raw_matrix(filesystem, path, suffix)
    except InputError:
        raise
    except (ValueError, KeyError, RuntimeError, zipfile.BadZipFile, EOFError) as error:
        kind = {".npy": "NumPy matrix", ".npz": "NumPy archive"}.get(suffix, f"{suffix} file")
        why = first_line(error).rpartition("Error: ")[2]  # FAISS begins with where in its code
        raise InputError(f"{path} is not a {kind}: {why}") from error


def _ranged(
    filesystem: pafs.FileSystem,
    path: str,
    rows: int,
    dimension: int,
    dtype: np.dtype[Any],
    offset: int,
    row_header: int = 0,
    ids: np.ndarray | None = None,
) -> Matrix:
    """A matrix of which any rows can be read alone; each may begin with a few bytes."""
    row_bytes = row_header + dimension * dtype.itemsize

    def read(start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        with filesystem.open_input_file(path) as stream:
            for first in range(start, stop, block_rows):
                count = min(block_rows, stop - first)
                data = stream.read_at(count * row_bytes, offset + first * row_bytes)
                if len(data) < count * row_bytes:
                    raise InputError(f"{path} ends before row {first + count} of {rows}")
                raw = np.frombuffer(data, np.uint8).reshape(count, row_bytes)
                if row_header:
                    said = np.ascontiguousarray(raw[:, :row_header]).view("<i4")[:, 0]
                    for row in np.flatnonzero(said != dimension)[:1]:
                        raise InputError(
                            f"{path}: its row {first + row} says the dimension {said[row]}, its "
                            f"first one {dimension}"
                        )
                values = np.ascontiguousarray(raw[:, row_header:]).view(dtype)
                numbers = np.arange(first, first + count)
                yield numbers if ids is None else ids[numbers], values.astype(np.float32)

    return Matrix(rows, dimension, read, ids)


def _numpy_matrix(filesystem: pafs.FileSystem, path: str) -> Matrix:
    with filesystem.open_input_file(path) as stream:
        shape, dtype = _numpy_header(stream, path)
        offset = stream.tell()
    _require_matrix(path, shape, dtype)
    return _ranged(filesystem, path, shape[0], shape[1], dtype, offset)


def _numpy_header(stream: Any, path: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of an array in row-major order, whose numbers come next in the stream."""
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read(stream)
    if is_fortran and len(shape) > 1:
        raise InputError(f"{path} is stored column by column; save it row by row (C order)")
    return shape, dtype


def _require_matrix(path: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 2 or dtype.kind not in "fiu":
        raise InputError(f"{path} holds {dtype} {shape}; required is a matrix of numbers (n, d)")


def _numpy_archive(filesystem: pafs.FileSystem, path: str) -> Matrix:
    """One matrix, or a matrix and its ids; read as a stream where it is compressed."""
    arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    with filesystem.open_input_file(path) as stream, zipfile.ZipFile(stream) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                arrays[name] = _numpy_header(member, path)
        matrices = [name for name, (shape, _) in arrays.items() if len(shape) == 2]
        if len(matrices) != 1:
            held = ", ".join(f"{n.removesuffix('.npy')} {a[0]}" for n, a in arrays.items())
            raise InputError(f"{path} holds {held}; required is one matrix (n, d), and ids (n,)")
        shape: tuple[int, ...] = arrays[matrices[0]][0]
        dtype: np.dtype[Any] = arrays[matrices[0]][1]
        _require_matrix(path, shape, dtype)
        ids = None
        if named := _ids_of(path, {n: d for n, (s, d) in arrays.items() if s == shape[:1]}):
            with archive.open(named) as member:
                ids = np.lib.format.read_array(member, allow_pickle=False)
            if ids.dtype.kind in "US":
                ids = ids.astype(str)
            elif not len(ids) or ids.max() <= np.iinfo(np.int64).max:
                ids = ids.astype(np.int64)
            if len(np.unique(ids)) < len(ids):
                raise InputError(
                    f"{path}: its array {named.removesuffix('.npy')!r} would be the ids, but holds "
                    "some more than once: save the matrix without it, or with ids"
                )
        packed = archive.getinfo(matrices[0])
        if packed.compress_type == zipfile.ZIP_STORED:
            with archive.open(packed) as member:
                _numpy_header(member, path)
                header_bytes = member.tell()
            stream.seek(packed.header_offset + _ZIP_LENGTHS)
            lengths = np.frombuffer(stream.read(4), "<u2")  # of its name and of further fields
            begin = packed.header_offset + _ZIP_LENGTHS + 4 + int(lengths.sum()) + header_bytes
            return _ranged(filesystem, path, shape[0], shape[1], dtype, begin, ids=ids)

    def read(start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        row_bytes = shape[1] * dtype.itemsize
        with (
            filesystem.open_input_file(path) as stream,
            zipfile.ZipFile(stream) as archive,
            archive.open(matrices[0]) as member,
        ):
            _numpy_header(member, path)
            member.seek(start * row_bytes, 1)
            for first in range(start, stop, block_rows):
                count = min(block_rows, stop - first)
                data = member.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise InputError(f"{path} ends before row {first + count} of {shape[0]}")
                values = np.frombuffer(data, dtype).reshape(count, -1).astype(np.float32)
                numbers = np.arange(first, first + count)
                yield numbers if ids is None else ids[first : first + count], values

    return Matrix(shape[0], shape[1], read, ids, sequential=True)


def _ids_of(path: str, arrays: Mapping[str, np.dtype[Any]]) -> str | None:
    """Which of the arrays as long as the matrix are its ids; None where there is none."""
    called = [name for name in arrays if name.lower() in ("id.npy", "ids.npy")]
    found = called or [name for name, dtype in arrays.items() if dtype.kind in "iuUSO"]
    if len(found) > 1:
        names = ", ".join(name.removesuffix(".npy") for name in found)
        raise InputError(
            f"{path} holds {names} beside the matrix: call the one that is its ids ids"
        )
    if not found:
        return None
    if arrays[found[0]].kind not in "iuUS":
        raise InputError(
            f"{path}: its array {found[0].removesuffix('.npy')!r} is of {arrays[found[0]]}; ids "
            "must be integers or strings: save them as ids.astype(str)"
        )
    return found[0]


def _raw_matrix(filesystem: pafs.FileSystem, path: str, suffix: str) -> Matrix:
    """``.fvecs``: each row begins with its dimension; ``.fbin``: rows and dimension come first."""
    size = filesystem.get_file_info(path).size
    with filesystem.open_input_file(path) as stream:
        head = np.frombuffer(stream.read(8), "<i4")
    if suffix in _VECS:
        dtype, dimension = _VECS[suffix], int(head[0])
        row_bytes = 4 + dimension * dtype.itemsize
        rows, rest = divmod(size, row_bytes) if dimension > 0 else (0, 1)
        offset, row_header = 0, 4
    else:
        dtype, rows, dimension = _BINS[suffix], int(head[0]), int(head[1])
        rest = size - 8 - rows * dimension * dtype.itemsize
        offset, row_header = 8, 0
    if rest or dimension < 1:
        raise ValueError(
            f"its {size:,} bytes are no whole number of vectors of the dimension {dimension} that "
            "its first bytes say"
        )
    return _ranged(filesystem, path, rows, dimension, dtype, offset, row_header)


def _faiss_index(filesystem: pafs.FileSystem, path: str) -> Matrix:
    """All vectors of an index, as exactly as it stores them.

    A local file is mapped, so that its vectors are in memory only as they are read; any other is
    loaded whole, and so is read in one go.
    """
    index, ids = _read_index(filesystem, path)

    def read(start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        opened, own = _read_index(filesystem, path)
        for first in range(start, stop, block_rows):
            count = min(block_rows, stop - first)
            numbers = np.arange(first, first + count)
            yield numbers if own is None else own[numbers], opened.reconstruct_n(first, count)

    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    return Matrix(index.ntotal, index.d, read, ids, sequential=not is_local)


def _read_index(filesystem: pafs.FileSystem, path: str) -> tuple[Any, np.ndarray | None]:
    """An index that can reconstruct its vectors by place, and their ids where it has them."""
    index: Any
    if isinstance(filesystem, pafs.LocalFileSystem):
        index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    else:
        size = filesystem.get_file_info(path).size or 0
        require_memory(path, size, "copy the index to a local disk, where it is mapped")
        with filesystem.open_input_file(path) as stream:
            reader = faiss.PyCallbackIOReader(stream.read)  # type: ignore[attr-defined]
            index = faiss.read_index(reader)
    ids = None
    if isinstance(index, faiss.IndexIDMap):
        ids = faiss.vector_to_array(index.id_map).astype(np.int64)
        owner, index = index, faiss.downcast_index(index.index)
        index.referenced_objects = [owner]  # whose end would free what it holds
    inner = index
    if isinstance(index, faiss.IndexPreTransform):
        inner = faiss.downcast_index(index.index)
    if isinstance(inner, faiss.IndexIVF):
        lists: Any = inner.invlists
        stored = np.concatenate(
            [
                faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).copy()
                for i in range(lists.nlist)
                if lists.list_size(i)
            ]
            or [np.empty(0, np.int64)]
        )
        if not np.array_equal(np.sort(stored), np.arange(len(stored))):
            raise InputError(
                f"{path} is an inverted-file index whose ids are not 0 to {len(stored) - 1}; its "
                "vectors cannot be given by place. Write them as Parquet with their ids"
            )
    if index.ntotal:
        index.reconstruct_n(0, 1)  # an index that cannot do so raises
    return index, ids
