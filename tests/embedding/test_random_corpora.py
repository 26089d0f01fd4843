"""Random corpora, interrupted at random, against a model of the job in plain Python."""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import inline_ray
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import trivial_workers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trivial_workers import DigestEncoder, tokens_of, vector_of

from pipelines.corpus.passages import cut_texts
from pipelines.embedding import chunks, keys, plan, write
from pipelines.embedding import job as embed
from pipelines.embedding.chunks import documents_of
from pipelines.embedding.config import EmbedConfig
from pipelines.embedding.encode import Workers, finish_chunk
from pipelines.embedding.job import embed_corpus
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord, read_run

TEXTS = [f"text {n} " + "word " * (n % 9) for n in range(25)]
POISON = "poison"


class PoisonedEncoder(DigestEncoder):
    """Has no finite vector for some texts."""

    seconds = 0.0

    def __call__(self, batch: pa.Table) -> pa.Table:
        tokens = documents_of(batch)["tokens"].to_pylist()
        vectors = np.stack([self.vector(ids) for ids in tokens])
        valid = np.array([not bytes(ids).startswith(POISON.encode()) for ids in tokens])
        return finish_chunk(self.settings, batch, vectors, valid, sum(map(len, tokens)))


@pytest.fixture(scope="module", autouse=True)
def small_and_inline():
    """Everything in this process, in pieces so small that a few documents make many of them."""
    with pytest.MonkeyPatch.context() as patch:
        inline_ray.run_inline(patch)
        workers = Workers(trivial_workers.tokenize, PoisonedEncoder)
        patch.setattr(embed, "WORKERS", workers)
        patch.setattr(embed, "SHARD_BYTES", 400)
        patch.setattr(plan, "PARTITION_BYTES", 600)
        patch.setattr(chunks, "FLUSH_BYTES", 300)
        patch.setattr(keys, "FLUSH_BYTES", 500)
        patch.setattr(write, "ROW_GROUP_BYTES", 2000)
        yield


@dataclass
class Expected:
    """What a job makes of rows that it is told of in corpus order."""

    rows: dict = field(default_factory=dict)
    rejected: Counter = field(default_factory=Counter)
    repeated: list = field(default_factory=list)
    documents: int = 0
    owners: dict = field(default_factory=dict)

    def add(self, row_id, text, *, has_ids: bool) -> None:
        self.documents += 1
        if has_ids and row_id is None:
            self.rejected[(None, "id is null")] += 1
        elif text is None or not text.strip():
            reason = "text is null" if text is None else "text is empty"
            self.rejected[(str(row_id) if has_ids else None, reason)] += 1
        else:
            own = str(row_id) if has_ids else hashlib.sha256(text.encode()).hexdigest()
            if own in self.owners:
                if has_ids or self.owners[own]:
                    self.rejected[(own, "duplicate id")] += 1
                else:
                    self.repeated.append(text)
                return
            self.owners[own] = has_ids
            self.rows[own] = text

    def counts(self) -> dict[str, int]:
        texts = set(self.rows.values())
        good = {text for text in texts if not text.startswith(POISON)}
        lost = sum(text.startswith(POISON) for text in self.rows.values())
        return {
            "documents": self.documents,
            "embedded": len(good),
            "rejected": self.rejected.total() + lost,
            "duplicates": len(self.rows) - lost - len(good) + len(self.repeated),
        }

    def in_passages(self, cut) -> "Expected":
        """The same where documents are cut."""
        rows = {}
        for own, text in self.rows.items():
            for number, (start, stop) in enumerate(cut(text)):
                rows[f"{own}#{number}"] = text[start:stop]
        repeated = [text[a:b] for text in self.repeated for a, b in cut(text)]
        return replace(self, rows=rows, repeated=repeated)


# ids that other documents may have because it is the hash of their text
HASHES = [hashlib.sha256(text.encode()).hexdigest() for text in TEXTS[:4]]
row = st.tuples(
    st.one_of(st.integers(0, 40), st.sampled_from([None, "x", "y", *HASHES])),
    st.one_of(
        st.sampled_from(TEXTS),
        st.sampled_from([None, "", "  ", f"{POISON} 1", f"{POISON} 2"]),
    ),
)
file = st.tuples(st.sampled_from(["parquet", "jsonl", "txt"]), st.lists(row, max_size=30))


def write_corpus(folder: Path, files) -> Expected:
    """The files, and what is expected of them."""
    expected = Expected()
    for number, (kind, rows) in enumerate(files):
        path = folder / f"{number:02d}.{kind}"
        if kind == "txt":
            lines = [text or "" for _, text in rows]
            path.write_text("".join(f"{text}\n" for text in lines))
            for text in lines:
                expected.add(None, text, has_ids=False)
            continue
        if kind == "parquet":
            ids = [None if row_id is None else str(row_id) for row_id, _ in rows]
            columns = {"id": pa.array(ids, pa.string())}
            columns["text"] = pa.array([text for _, text in rows], pa.string())
            pq.write_table(pa.table(columns), path, row_group_size=5)
        else:
            path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in rows))
        for row_id, text in rows:
            expected.add(row_id, text, has_ids=True)
    return expected


class Interrupted(BaseException):
    """What no code of ours catches, as a kill."""


def run(config: EmbedConfig, interrupt_at: int | None) -> None:
    left = [interrupt_at]

    def count() -> None:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted

    record = RunRecord.of("embed_corpus", config, keep_complete=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inline_ray, "before_unit", count)
        with record:
            embed_corpus(config, record)


@settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    files=st.lists(file, min_size=1, max_size=5).filter(lambda fs: any(rows for _, rows in fs)),
    interrupts=st.lists(st.integers(0, 60), max_size=3),
    chunk_tokens=st.sampled_from([60, 300, 5000]),
    passages=st.sampled_from([("", 0), ("tokens:8", 0), ("tokens:9", 3)]),
)
def test_any_corpus_gives_the_rows_of_the_model(
    tiny_model_folder, files, interrupts, chunk_tokens, passages
):
    files = [(kind, rows) for kind, rows in files if rows]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        expected = write_corpus(folder / "corpus", files)
        config = EmbedConfig(
            corpus=str(folder / "corpus"),
            output=str(folder / "out"),
            model=str(tiny_model_folder),
            keep_columns=("text",),
            chunk_tokens=chunk_tokens,
            max_rejected_fraction=1.0,
            passages=passages[0],
            passage_overlap=passages[1],
        )
        if config.passages:
            reader = PromptedTokenizer.load(EncoderConfig(model=config.model, prompt="one-word"))
            cuts = config.cuts(256)
            expected = expected.in_passages(
                lambda text: cut_texts([text], cuts, reader)[0].tolist()
            )
        for interrupt_at in interrupts:
            try:
                run(config, interrupt_at)
            except (Interrupted, InputError):
                continue
        if not expected.counts()["embedded"]:
            with pytest.raises(InputError, match="documents got no vector"):
                run(config, None)
            return
        run(config, None)
        check(config, expected)
        shutil.rmtree(folder / "corpus")


def check(config: EmbedConfig, expected: Expected) -> None:
    found = read_run(config.output)["counts"]
    assert {name: found[name] for name in expected.counts()} == expected.counts()
    table = pads.dataset(f"{config.output}/embeddings").to_table()
    texts = dict(zip(map(str, table["id"].to_pylist()), table["text"].to_pylist(), strict=True))
    assert len(texts) == len(table)
    assert texts == {i: t for i, t in expected.rows.items() if not t.startswith(POISON)}
    for text, vector in zip(table["text"].to_pylist(), table["embedding"].to_pylist(), strict=True):
        np.testing.assert_array_equal(vector, vector_of(tokens_of(text)))
    lost = pads.dataset(f"{config.output}/rejected").to_table()
    reasons = Counter(zip(lost["id"].to_pylist(), lost["reason"].to_pylist(), strict=True))
    poisoned = [i for i, t in expected.rows.items() if t.startswith(POISON)]
    assert reasons == expected.rejected + Counter((i, write.NOT_FINITE) for i in poisoned)
