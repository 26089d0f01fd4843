"""A corpus as files: which there are, in which format, and how each is cut into shards.

In: a path (file, folder, glob or table, local or remote) and how it is to be read. Out: a list of
:class:`CorpusFile`, not yet looked into; :func:`pipelines.corpus.readers.inspect_files` does that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.corpus.streams import UTF_8, encoding_by_mark, line_end, read_head
from pipelines.runtime.errors import InputError, StorageError
from pipelines.runtime.files import (
    in_threads,
    open_filesystem,
    read_bytes,
    state_mark,
    with_inner_path,
    with_retries,
)
from pipelines.runtime.listing import match_files, root_of
from pipelines.runtime.table_folders import LANCE_SUFFIX, refuse_files_of_tables, require_table
from pipelines.runtime.table_view import TableView, hive_view
from pipelines.runtime.tables import table_files

Format = Literal[
    "parquet", "arrow", "lance", "jsonl", "json", "csv", "tsv", "text", "document", "wet"
]
TextUnit = Literal["line", "file"]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".arrows": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "text",
    ".wet": "wet",
}
DOCUMENT_SUFFIXES = (".txt", ".md", ".markdown")
"""With ``--text-unit file`` a file of these names is one document."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz", ".lz4": "lz4"}
NEVER_COMPRESSED = ("parquet", "arrow", "lance")
WHOLE_SCHEMA = ("parquet", "arrow", "lance", "csv", "tsv")
"""Formats in which a file says all its columns."""
LINES = ("jsonl", "csv", "tsv", "text")
DEFAULT_ID_COLUMN = "id"
_CACHE_OR_STATE = re.compile(r"cache-.*\.arrow$|state\.json$")
_JSON_LINES = 50
"""By so many first lines a ``.json`` file is told."""
_METADATA_NAMES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is read where its files do not say so themselves."""

    version: str = ""
    """Version or time (ISO 8601) of a Delta, Iceberg or Lance table; its current one by default."""
    text_unit: TextUnit = "line"
    """What is a document of .txt files: a line, or (with .md files too) a whole file."""
    csv_delimiter: str = ""
    """What parts the fields of CSV and TSV; found by default."""
    csv_quote: str = ""
    """Quotation mark of CSV and TSV, or `none`; found by default."""
    csv_escape: str = ""
    """What stands before a quotation mark of the text, a mark or `none`; found by default."""
    csv_header: tuple[str, ...] = ()
    """Names of the columns of CSV and TSV whose first row is data already."""

    def check_reading(self) -> None:
        """Raise :class:`InputError` for values that mean nothing."""
        if self.text_unit not in get_args(TextUnit):
            raise InputError(f"text_unit is {self.text_unit!r}; known are {get_args(TextUnit)}")
        for name in ("csv_delimiter", "csv_quote", "csv_escape"):
            value = getattr(self, name).replace("\\t", "\t")
            if len(value) > 1 and not (value == "none" and name != "csv_delimiter"):
                raise InputError(f"{name} is {value!r}; required is one character")

    def check_unused(self, why: str) -> None:
        """Raise :class:`InputError` for one that is given though no corpus is read, and ``why``."""
        given = [name for name, value in asdict(self.reading).items() if value != _unset(name)]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} has no effect {why}: drop it")

    @property
    def reading(self) -> CorpusOptions:
        """These options alone, of a configuration that has more."""
        return CorpusOptions(**{n: getattr(self, n) for n in CorpusOptions.__dataclass_fields__})


def _unset(option: str) -> Any:
    return CorpusOptions.__dataclass_fields__[option].default


class Dialect(NamedTuple):
    """How a file of CSV or TSV is written; without ``quote`` its fields are not quoted.

    ``escape`` stands before a quotation mark of the text, which else is doubled. ``header`` names
    the columns where the file does not.
    """

    delimiter: str
    quote: str
    escape: str
    header: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Which columns of a corpus are wanted; ``id`` None takes ``id`` where a file has it."""

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()

    def id_of(self, file: CorpusFile) -> str | None:
        """The id column of one file, or None where its ids are content hashes."""
        if self.id is not None:
            return self.id
        # a line may have an id though those at the file's beginning have none
        own = DEFAULT_ID_COLUMN in file.columns or file.format in ("jsonl", "document", "wet")
        return DEFAULT_ID_COLUMN if own else None

    def wanted(self, file: CorpusFile) -> list[str]:
        """Names to read of one file, each once."""
        row_id = self.id_of(file)
        return list(dict.fromkeys([self.text, *([row_id] if row_id else []), *self.keep]))


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus: where it is, which state of it, and what is in it.

    ``text_bytes`` estimates the uncompressed size; ``rows`` is None where only reading tells;
    ``bounds`` cut the file into shards: row groups of Parquet, record batches of Arrow, fragments
    of Lance, bytes of lines, else (0, 1), or (0,) where there is not one line. ``view`` says what
    the file's place, in a table or in folders named ``key=value``, adds to it.
    """

    path: str
    size_bytes: int
    modified_ns: int
    format: Format
    compression: str | None
    columns: tuple[str, ...] = ()
    text_bytes: int = 0
    rows: int | None = None
    bounds: tuple[int, ...] = (0, 1)
    problem: str | None = None
    view: TableView = field(default_factory=TableView)
    dialect: Dialect | None = None
    encoding: str = "utf-8"
    newline: str = "\n"
    head_is_all: bool = True
    """Whether ``columns`` are those of all rows, and not of the first MiB of lines."""
    mark: str | None = None
    """Its service's own mark of its state, where no time of change is told."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "view", TableView(*self.view))  # a list, where JSON made it one
        if self.dialect is not None:
            object.__setattr__(self, "dialect", Dialect(*self.dialect))

    @property
    def state(self) -> list[Any]:
        """What tells two states of the file apart."""
        marks = [] if self.mark is None else [self.mark]
        return [self.size_bytes, self.modified_ns, *marks, *self.view.state]

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Its columns, and those that its place gives it."""
        return tuple(dict.fromkeys([*self.columns, *self.view.constants]))

    @property
    def readable(self) -> bool:
        """Whether there is something of it to read."""
        return not self.problem and len(self.bounds) > 1

    def has(self, name: str) -> bool:
        """Whether there is such a column, or ``column.field`` may be a field of one."""
        return name in self.all_columns or (
            self.format == "jsonl" and name.split(".")[0] in self.columns
        )

    def shards(self) -> list[Shard]:
        """The file's pieces, in order."""
        cuts = zip(self.bounds, self.bounds[1:], strict=False)
        return [] if self.problem else [Shard(self, start, stop) for start, stop in cuts]


@dataclass(frozen=True)
class Shard:
    """A piece of one file that one task reads: [start, stop) in the unit of its ``bounds``."""

    file: CorpusFile
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Names the piece and the state of its file, so that a changed file is read anew."""
        key = json.dumps([self.file.path, *self.file.state, self.start, self.stop])
        return hashlib.sha256(key.encode()).hexdigest()[:20]

    def to_unit(self) -> dict[str, Any]:
        """The shard as plain JSON values for a worker; of the file's bounds only its own."""
        return asdict(replace(self.file, bounds=(self.start, self.stop)))

    @classmethod
    def from_unit(cls, unit: Mapping[str, Any]) -> Shard:
        """Undo :meth:`to_unit`."""
        file = CorpusFile(**unit)
        return cls(file, *file.bounds)


@dataclass(frozen=True)
class CorpusListing:
    """The files of a corpus in the order of their paths, and why others there are not read."""

    files: list[CorpusFile]
    passed_over: dict[str, str]


def find_files(corpus: str, options: CorpusOptions | None = None) -> list[CorpusFile]:
    """The files of :func:`find_corpus`."""
    return find_corpus(corpus, options).files


def find_corpus(corpus: str, options: CorpusOptions | None = None) -> CorpusListing:
    """Every file of a corpus in the order of their paths, not yet looked into.

    Raises :class:`InputError` where there is no such path or no file of a known format.
    """
    options = options or CorpusOptions()
    infos = match_files(corpus, datasets=(LANCE_SUFFIX,))
    refuse_files_of_tables(corpus, infos)
    require_table(options.version, corpus, infos)
    places = [with_inner_path(corpus, info.path) for info in infos]
    root, filesystem = root_of(corpus), open_filesystem(corpus)[0]
    files: list[CorpusFile] = []
    passed_over: dict[str, str] = {}
    for info, path in zip(infos, places, strict=True):
        if info.type == pafs.FileType.Directory:
            files += _table(path, options)
        elif known := known_format(info.path, options.text_unit):
            view, mark = hive_view(info.path, root), state_mark(filesystem, info)
            file = CorpusFile(path, info.size or 0, info.mtime_ns or 0, *known, view=view)
            files.append(replace(file, mark=mark) if isinstance(mark, str) else file)
        else:
            passed_over[path] = _why_unknown(info.path)
    files, metadata = _without_metadata(files, alone=len(infos) == 1)
    passed_over |= metadata
    if options.text_unit == "file":
        files = [_as_document(file, root) for file in files]
    empty = {file.path: "0 bytes" for file in files if _holds_no_row(file)}
    if len(empty) < len(files):
        files = [file for file in files if file.path not in empty]
        passed_over |= empty
    if not files:
        why = "".join(f" {path}: {reason}." for path, reason in [*metadata.items()][:1])
        if len(infos) == 1 and infos[0].type == pafs.FileType.Directory:
            raise InputError(f"{corpus} is a table without a row")
        if len(infos) == 1:
            raise InputError(f"{corpus}: {passed_over[places[0]]}. {_formats_known()}")
        raise InputError(f"no file of a known format at {corpus}.{why} {_formats_known()}")
    for reason in dict.fromkeys(passed_over.values()):
        names = [path for path, other in passed_over.items() if other == reason]
        log.warning("not read: %d files of %s, %s", len(names), reason, names[0])
    return CorpusListing(sorted(files, key=lambda file: file.path), passed_over)


def _why_unknown(path: str) -> str:
    if path.endswith(LANCE_SUFFIX):
        return f"a Lance dataset, whose folder must be named NAME{LANCE_SUFFIX} to be read"
    return "unknown format"


def known_format(path: str, text_unit: TextUnit = "line") -> tuple[Format, str | None] | None:
    """Format and compression that a file's name tells, or None."""
    name = path.rpartition("/")[2].lower()
    stem, dot, suffix = name.rpartition(".")
    compression = COMPRESSIONS.get(dot + suffix)
    if compression:
        stem, dot, suffix = stem.rpartition(".")
    if text_unit == "file" and dot + suffix in DOCUMENT_SUFFIXES:
        return "document", compression
    found = FORMATS.get(dot + suffix)
    return (
        None
        if found is None or (compression and found in NEVER_COMPRESSED)
        else (found, compression)
    )


def listing_of(files: Sequence[CorpusFile]) -> list[list[Any]]:
    """Path, size and time of change, or mark, of every file: the state of a corpus."""
    return [[file.path, *file.state] for file in files]


def listing_digest(listing: Sequence[Sequence[Any]]) -> str:
    """SHA-256 of a listing."""
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def describe_problem(error: BaseException) -> str:
    """An error from reading a file as the end of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"it cannot be read: {lines[0][:300]}"


def _table(path: str, options: CorpusOptions) -> list[CorpusFile]:
    form: Format = "lance" if path.endswith(LANCE_SUFFIX) else "parquet"
    return [
        CorpusFile(file.path, file.size_bytes, file.modified_ns, form, None, view=file.view)
        for file in table_files(path, options.version)
    ]


def _holds_no_row(file: CorpusFile) -> bool:
    """Whether it is a file of lines without one, as Spark leaves for parts that had no row."""
    return not (file.size_bytes or file.compression) and file.format in LINES


def _as_document(file: CorpusFile, root: str) -> CorpusFile:
    if file.format != "document":
        return file
    inner = open_filesystem(file.path)[1]
    name = inner.removeprefix(root) if inner.startswith(root) else inner.rpartition("/")[2]
    constants = {**file.view.constants, DEFAULT_ID_COLUMN: name, "path": name}
    return replace(file, view=TableView(constants=constants))


# ---- which .json files and Arrow files are documents


def _without_metadata(
    files: list[CorpusFile], *, alone: bool
) -> tuple[list[CorpusFile], dict[str, str]]:
    """The files that hold documents, ``.json`` as JSON lines, and what the others are."""
    passed_over: dict[str, str] = {}
    shards = {} if alone else _saved_datasets(files)
    kept = []
    is_only_kind = all(file.format == "json" for file in files)
    unsure = [file for file in files if file.format == "json"]
    reasons = dict(zip([f.path for f in unsure], in_threads(_json_problem, unsure), strict=True))
    for file in files:
        folder, _, name = file.path.rpartition("/")
        if file.format == "arrow" and folder in shards and name not in shards[folder]:
            passed_over[file.path] = "a dataset's cache"
        elif file.format != "json":
            kept.append(file)
        elif not alone and (name in _METADATA_NAMES or name.endswith(".metadata.json")):
            passed_over[file.path] = "a dataset's description"
        elif (reason := reasons[file.path]) in (None, _ONE_OBJECT):
            if reason and not is_only_kind:
                passed_over[file.path] = "a single JSON object"
            else:
                kept.append(replace(file, format="jsonl"))
        elif reason is not None:
            passed_over[file.path] = reason
    return kept, passed_over


JSON_ARRAY = "a JSON array; it must be JSON lines, one object a line: jq -c '.[]' FILE"
_ONE_OBJECT = "one object"


def _json_problem(file: CorpusFile) -> str | None:
    """Why a ``.json`` file is no JSON lines; :data:`_ONE_OBJECT` where it has but one line."""
    if not file.size_bytes:
        return None
    try:
        head = with_retries(partial(_head_of, file), file.path, decodes=True)
    except StorageError:
        raise
    except (OSError, pa.ArrowException):
        return None  # looking into the file will say why
    text = head.decode("utf-8-sig", "replace").lstrip()
    if text.startswith("["):
        return JSON_ARRAY
    lines = [line for line in text.split(line_end(head))[:_JSON_LINES] if line.strip()]
    first = _is_object(lines[0] if lines else "")
    if first is False:
        return "JSON, but not of objects"
    # of one value over several lines at most a few are an object each
    if not first and 2 * sum(map(bool, map(_is_object, lines))) < max(1, len(lines)):
        return "JSON over several lines; it must be JSON lines, one object a line"
    return None if len(lines) > 1 else _ONE_OBJECT


def _head_of(file: CorpusFile) -> bytes:
    head = read_head(file.path, file.compression)
    encoding = encoding_by_mark(head)
    return head if encoding == UTF_8 else read_head(file.path, file.compression, encoding)


def _is_object(line: str) -> bool | None:
    """Whether a line of JSON holds an object; None where it is none of JSON."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return None


def _saved_datasets(files: Iterable[CorpusFile]) -> dict[str, set[str]]:
    """Folders that ``save_to_disk`` wrote, and the names of their data files.

    A glob of Arrow files does not match the file that says these: a cache's name asks for it.
    """
    places = [file.path.rpartition("/") for file in files]
    shards = {}
    for folder in dict.fromkeys(f for f, _, name in places if _CACHE_OR_STATE.match(name)):
        try:
            parts = json.loads(read_bytes(f"{folder}/state.json")).get("_data_files", [])
            shards[folder] = {part["filename"] for part in parts}
        except (ValueError, AttributeError, KeyError, TypeError, FileNotFoundError):
            continue
    return shards


def _formats_known() -> str:
    packed = ", ".join(COMPRESSIONS)
    return (
        f"Known are {', '.join(FORMATS)} (with --text-unit file also .md), tables of Delta, "
        f"Iceberg and Lance; those of text also with {packed}"
    )
