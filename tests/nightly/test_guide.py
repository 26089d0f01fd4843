"""The guide's encoder change, from dry run to rollback, command by command."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from nights import text_of, write_corpus

from pipelines.embedding.estimate import Estimate
from pipelines.nightly import dry_run
from pipelines.nightly.config import NightConfig
from pipelines.nightly.job import JOB, reindex
from pipelines.runtime import command
from pipelines.store.config import VERBS
from pipelines.store.manage import manage_store
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

pytestmark = pytest.mark.usefixtures("no_model")

PAGE = Path(__file__).parents[2] / "docs" / "nightly.md"
BLOCK = re.compile(r"```bash\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.S)
OF_THE_EXAMPLE = re.compile(r"(check|cluster) \d.*")
"""Rows that another corpus need not have."""
DOCUMENTS = 100


def steps() -> list[tuple[str, int, list[str]]]:
    """Each command of the walk, its exit code, and the rows that the page shows of its output."""
    walk = PAGE.read_text().split("## Changing the encoder, step by step\n")[1].split("\n### ")[0]
    found = []
    for block, shown in BLOCK.findall(walk):
        for line in block.splitlines():
            code = re.search(r"# exit code (\d)", line)
            found.append((line.split("#")[0], int(code.group(1)) if code else 0, []))
        found[-1][2].extend(re.findall(r"^(\S+(?: \S+)*)  ", shown, re.M))
    return found


def run(line: str, monkeypatch) -> int:
    """One command of the page, in this process."""
    job, *arguments = shlex.split(line)[1:]
    monkeypatch.setattr(sys, "argv", [job, *arguments])
    with pytest.raises(SystemExit) as stop:
        if "nightly_reindex" in job:
            command.run_unrecorded_job(JOB, NightConfig, reindex)
        else:
            command.run_verbs("manage_store", VERBS, manage_store)
    return int(stop.value.code or 0)


def test_the_walk_goes_as_the_page_says(tmp_path, tiny_model_folder, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus", {n: text_of(n) for n in range(DOCUMENTS)})
    model = f"--model {tiny_model_folder} --num-clusters 5 --num-actors 1 --map-documents 10"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "connect_ray", lambda: None)
    measured = Estimate(1, DOCUMENTS, 10 * DOCUMENTS, 100.0, 5.0)
    monkeypatch.setattr(dry_run, "estimate_run", lambda *_: measured)
    monkeypatch.setenv("COLUMNS", "200")
    walk = steps()
    assert len(walk) > 8
    first_part = True
    for line, code, names in walk:
        filled = line.replace("CORPUS", corpus).replace("STORE", str(tmp_path / "store"))
        if "nightly_reindex" in filled:
            filled += f" {model} --chunk-tokens 300"
        if first_part and "--max-embed-hours" in filled:
            first_part = False
            filled = re.sub(r"--max-embed-hours \S+", "--max-embed-hours 1e-9", filled)
        ended = run(filled, monkeypatch)
        out, err = capsys.readouterr()
        assert ended == code, (line, out, err)
        rows = re.findall(r"^[│┃] (.*?) *[│┃]", out, re.M)
        shown = {name for name in names if not OF_THE_EXAMPLE.fullmatch(name)}
        assert shown <= set(rows), (line, rows)
    store = Store.open(str(tmp_path / "store"))
    assert [p.action for p in store.publications()][-2:] == ["publish", "rollback"]
    assert store.version().number == 1
    assert verify_store(store) == []
