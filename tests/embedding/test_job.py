"""The whole job on a tiny model: formats, counts, bad input, going on, S3."""

import contextlib
import gzip
import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from urllib.request import urlopen

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import ray

from pipelines.embedding import job as embed_module
from pipelines.embedding.config import EmbedConfig
from pipelines.embedding.encode import ChunkEncoder, Workers, tokenize_chunk
from pipelines.embedding.job import embed_corpus
from pipelines.embedding.progress import Progress
from pipelines.embedding.write import Chunk, plan_parts
from pipelines.encoder.encoder import Encoder
from pipelines.runtime.errors import InputError
from pipelines.runtime.machines import plan_actors
from pipelines.runtime.run_record import RunRecord, read_run

WORDS = ["sea", "guitar", "market", "orbit", "planet", "eggs", "flour", "law", "court", "goal", "a"]


def texts(count: int, start: int = 0) -> list[str]:
    return [
        f"{WORDS[n % 11]} {WORDS[n // 11 % 11]} {n} " * (1 + n % 5)
        for n in range(start, start + count)
    ]


def run(config: EmbedConfig) -> dict:
    """What the job's command does; the counts."""
    record = RunRecord.of("embed_corpus", config, keep_complete=True)
    with record:
        embed_corpus(config, record)
    return read_run(config.output)["counts"]


def result(output: str | Path) -> pd.DataFrame:
    return pads.dataset(f"{output}/embeddings").to_table().to_pandas().set_index("id").sort_index()


def rejected(output: str | Path) -> list[tuple]:
    table = pads.dataset(f"{output}/rejected").to_table()
    return sorted(
        zip(*(table[name].to_pylist() for name in ("id", "reason")), strict=True), key=str
    )


@pytest.fixture
def config(tmp_path, tiny_model_folder, local_ray) -> EmbedConfig:
    (tmp_path / "corpus").mkdir()
    return EmbedConfig(
        corpus=str(tmp_path / "corpus"),
        output=str(tmp_path / "out"),
        model=str(tiny_model_folder),
        num_actors="1",
    )


def test_a_mixed_corpus_becomes_one_table_with_counts_that_add_up(config):
    corpus = Path(config.corpus)
    body = texts(600)
    body[5] = body[4]
    body[7], body[8] = None, "  \n"
    pq.write_table(
        pa.table({"id": list(range(300)), "text": body[:300], "label": ["x"] * 300}),
        corpus / "a.parquet",
        row_group_size=100,
    )
    with (corpus / "b.jsonl").open("w") as lines:
        for n in range(300, 600):
            lines.write(json.dumps({"id": n, "text": body[n], "label": n % 3}) + "\n")
        lines.write('{"id": 1, "text": "its id was taken", "label": null}\n{broken\n')
        lines.write('{"id": 900, "text": 12}\n{"id": null, "text": "no id"}\n')
    (corpus / "notes.docx").write_text("no format of a corpus")
    counts = run(replace(config, keep_columns=("label", "text"), chunk_tokens=2000))
    assert counts["documents"] == 604
    assert counts["rejected"] == 6
    assert counts["duplicates"] == 1
    assert counts["embedded"] == 597
    assert read_run(config.output)["metrics"]["files_passed_over"] == 1
    assert rejected(config.output) == [
        ("1", "duplicate id"),
        ("7", "text is null"),
        ("8", "text is empty"),
        ("900", "text is an integer, not a string"),
        (None, "id is null"),
        (None, "malformed JSON line"),
    ]
    found = result(config.output)
    expected = {n: t for n, t in enumerate(body) if t and t.strip()}
    assert found["text"].to_dict() == expected
    assert found.loc[0, "label"] == "x"
    assert found.loc[301, "label"] == "1"
    assert {hashlib.sha256(t.encode()).hexdigest() for t in expected.values()} == set(
        found["text_sha256"]
    )
    vectors = Encoder.load(config.encoder, device="cpu").encode(list(expected.values()))
    np.testing.assert_allclose(np.stack(found["embedding"]), vectors, atol=0.03)
    assert not (Path(config.output) / "_work").exists()


def test_the_result_is_read_by_everyone_as_fixed_size_lists(config):
    pq.write_table(
        pa.table({"id": [str(n) for n in range(100)], "text": texts(100)}),
        Path(config.corpus) / "a.parquet",
    )
    run(replace(config, float16=True))
    (path,) = Path(config.output, "embeddings").iterdir()
    schema = pq.read_schema(path)
    assert schema.names == ["id", "text_sha256", "embedding"]
    assert schema.field("embedding").type == pa.list_(pa.float16(), 64)
    encoder = json.loads(Path(config.output, "encoder.json").read_text())
    assert schema.metadata[b"shoal.encoder_fingerprint"].decode() == encoder["fingerprint"]
    assert pl.read_parquet(path).schema["id"] == pl.String
    assert pl.read_parquet(path)["embedding"].to_numpy().shape == (100, 64)
    assert np.stack(pd.read_parquet(path)["embedding"]).shape == (100, 64)
    counted = duckdb.sql(f"select count(*), min(len(embedding)) from '{path}'").fetchall()
    assert counted == [(100, 64)]


def test_without_an_id_column_the_text_is_the_key_and_appears_once(config):
    Path(config.corpus, "a.txt").write_text("one\ntwo\none\n\nthree\n")
    counts = run(config)
    assert counts == counts | {"documents": 5, "embedded": 3, "rejected": 1, "duplicates": 1}
    found = result(config.output)
    assert list(found.index) == list(found["text_sha256"])
    assert hashlib.sha256(b"one").hexdigest() in found.index


def test_a_complete_folder_is_confirmed_and_a_changed_corpus_refused(config):
    path = Path(config.corpus, "a.txt")
    path.write_text("one\ntwo\n")
    counts = run(config)
    before = Path(config.output, "run.json").read_text()
    assert run(config) == counts
    assert run(replace(config, num_actors="2")) == counts
    path.write_text("one\ntwo\nthree\n")
    with pytest.raises(InputError, match="has changed since: choose another --output"):
        run(config)
    assert Path(config.output, "run.json").read_text() == before
    with pytest.raises(InputError, match="its max_tokens is None, this one's is 9"):
        run(replace(config, max_tokens=9))


def test_a_failed_run_goes_on_where_it_was(config, monkeypatch):
    Path(config.corpus, "a.txt").write_text("\n".join(texts(400)))
    config = replace(config, chunk_tokens=1000)
    real = embed_module.write_result
    monkeypatch.setattr(embed_module, "write_result", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config)
    assert read_run(config.output)["status"] == "failed"
    vectors = sorted(Path(config.output, "_work", "vectors").iterdir())
    assert len(vectors) > 3
    first, *rows = (pq.read_metadata(path).num_rows for path in vectors)
    assert first < max(rows) / 8  # so that it comes soon
    kept = {path: path.stat().st_mtime_ns for path in vectors[1:]}
    vectors[0].unlink()
    monkeypatch.setattr(embed_module, "write_result", real)
    seen = {}
    monkeypatch.setattr(
        embed_module,
        "remove_folder",
        lambda _: seen.update({path: path.stat().st_mtime_ns for path in kept}),
    )
    assert run(config)["embedded"] == 400
    assert seen == kept


def test_on_the_way_a_changed_corpus_or_encoder_is_refused(config, monkeypatch, tmp_path):
    path = Path(config.corpus, "a.txt")
    path.write_text("one\ntwo\n")
    monkeypatch.setattr(embed_module, "embed_chunks", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config)
    path.write_text("one\ntwo\nthree\n")
    with pytest.raises(InputError, match=r"not the one this run began with: .*a\.txt has changed"):
        run(config)
    plan = tmp_path / "out/_work/plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"fingerprint": "0"}))
    with pytest.raises(InputError, match="begun with another encoder"):
        run(config)


def test_an_unreadable_file_is_named_and_can_be_mended_or_skipped(config, tmp_path):
    good, bad = Path(config.corpus, "a.txt"), Path(config.corpus, "b.parquet")
    good.write_text("one\ntwo\n")
    bad.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"b\.parquet: it cannot be read.*--skip-unreadable"):
        run(config)
    skipped = replace(config, skip_unreadable_files=True)
    counts = run(replace(skipped, output=str(tmp_path / "skipped")))
    assert counts == counts | {"documents": 3, "embedded": 2, "rejected": 1}
    ((row_id, reason),) = rejected(tmp_path / "skipped")
    assert row_id is None
    assert reason.startswith("unreadable file")
    pq.write_table(pa.table({"text": ["three"]}), bad)
    assert run(config)["embedded"] == 3


def test_too_many_rejected_documents_fail_with_the_top_reasons(config):
    Path(config.corpus, "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n' + "{\n" * 3)
    with pytest.raises(InputError, match=r"4 of 5 .*0\.5 allows: malformed JSON line \(3\)"):
        run(config)
    counts = run(replace(config, max_rejected_fraction=0.9))
    assert counts == counts | {"documents": 5, "embedded": 1, "rejected": 4}


def test_a_corpus_where_everything_is_rejected_fails_and_keeps_the_reasons(config):
    Path(config.corpus, "a.txt").write_text("\n\n")
    with pytest.raises(InputError, match="2 of 2 documents got no vector"):
        run(replace(config, max_rejected_fraction=1.0))
    assert len(rejected(config.output)) == 2


@pytest.mark.parametrize("missing", ["corpus", "model"])
def test_what_is_not_there_is_told_before_ray_starts(tmp_path, missing):
    (tmp_path / "a.txt").write_text("one\n")
    config = EmbedConfig(corpus=str(tmp_path / "a.txt"), output=str(tmp_path / "out"))
    bad = replace(config, **{missing: str(tmp_path / "none")})
    record = RunRecord(bad.output, "embed_corpus", asdict(bad))
    with pytest.raises(InputError, match="no such"):
        embed_corpus(bad, record, lambda: pytest.fail("Ray was started"))


def test_a_corpus_without_a_document_is_an_error(config):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), Path(config.corpus, "a.parquet"))
    with pytest.raises(InputError, match="no document"):
        run(config)


def test_a_text_whose_vector_is_not_finite_is_rejected_with_all_its_documents(config, monkeypatch):
    body = ["fine one", "poison " * 9, "fine two", "poison " * 9]
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": body}), Path(config.corpus, "a.parquet"))

    class Poisoned(ChunkEncoder):
        def _encode(self, encoder, tokens):
            found, valid = super()._encode(encoder, tokens)
            return found, valid & np.array([len(ids) < max(map(len, tokens)) for ids in tokens])

    monkeypatch.setattr(embed_module, "WORKERS", Workers(tokenize_chunk, Poisoned))
    counts = run(config)
    assert counts == counts | {"documents": 4, "embedded": 2, "rejected": 2, "duplicates": 0}
    assert rejected(config.output) == [
        ("2", "its vector is not finite"),
        ("4", "its vector is not finite"),
    ]
    few = replace(config, max_rejected_fraction=0.4, output=f"{config.output}-few")
    with pytest.raises(InputError, match=r"2 of 4 documents got no vector, and 2 texts got one"):
        run(few)
    assert json.loads(Path(few.output, "run.json").read_text())["status"] == "failed"


def test_reading_and_writing_s3(config, s3_server):
    s3_server.create_bucket(Bucket="shoal-embed")
    body = b"".join(b'{"id": %d, "text": "text %d"}\n' % (n, n) for n in range(200))
    s3_server.put_object(Bucket="shoal-embed", Key="in/a.jsonl", Body=body)
    on_s3 = replace(config, corpus="s3://shoal-embed/in/*.jsonl", output="s3://shoal-embed/out")
    assert run(on_s3)["embedded"] == 200
    listing = s3_server.list_objects_v2(Bucket="shoal-embed", Prefix="out/")["Contents"]
    names = {item["Key"].split("/")[1] for item in listing}
    # pyarrow leaves an empty object "out/" where it has deleted something below
    assert names - {""} == {"embeddings", "rejected", "encoder.json", "run.json"}
    filesystem, path = pa.fs.FileSystem.from_uri("s3://shoal-embed/out/embeddings")
    assert pads.dataset(path, filesystem=filesystem).count_rows() == 200


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(config):
    Path(config.corpus, "a.txt").write_text("\n".join(texts(500)))
    config = replace(config, dry_run=True)
    summary = embed_corpus(config, RunRecord(config.output, "embed_corpus", {})).summary
    assert summary["text"] == "1 files; columns text; 1 without an id column: hashes of the texts"
    assert summary["text, row 3"] == f"hash of its text: {' '.join(texts(3)[2].split())}"
    assert summary["files"] == "1"
    documents = int(summary["documents"].removeprefix("about ").replace(",", ""))
    assert 400 < documents < 600
    assert summary["actors"] == "1, each 1 CPUs and 0 GPUs"
    assert not Path(config.output).exists()


@pytest.mark.slow
def test_two_hundred_thousand_documents_of_mixed_formats_with_poison_add_up(config):
    folder = Path(config.corpus)
    good = {n: f"{WORDS[n % 11]} {WORDS[n // 11 % 11]} {n}" for n in range(198_000)}
    good |= {n: good[n - 1000] for n in range(1000, 2000)}
    parquet = dict(list(good.items())[:80_000])
    pq.write_table(
        pa.table(
            {
                "id": [*parquet, *range(900_000, 900_400)],
                "text": [*parquet.values(), *([None, " "] * 200)],
            }
        ),
        folder / "a.parquet",
        row_group_size=5000,
    )
    cuts = {"b.jsonl": (80_000, 130_000), "c.jsonl.gz": (130_000, 160_000)}
    for name, (start, stop) in cuts.items():
        lines = [json.dumps({"id": n, "text": good[n]}).encode() for n in range(start, stop)]
        lines[::100] = [b"{poison", b'{"id": 7, "text": "\xff"}'] * (len(lines) // 200)
        data = b"\n".join(lines) + b"\n"
        (folder / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    for name, (start, stop), mark in (
        ("d.csv", (160_000, 180_000), ","),
        ("e.tsv", (180_000, 198_000), "\t"),
    ):
        lines = [f"{n}{mark}{good[n]}" for n in range(start, stop)]
        lines[::100] = ["no second field", f"7{mark}its id is taken"] * (len(lines) // 200)
        (folder / name).write_text("\n".join([f"id{mark}text", *lines]) + "\n")
    lost = 50_000 // 100 + 30_000 // 100 + 20_000 // 100 + 18_000 // 100
    (folder / "f.txt").write_text("".join(f"line {n}\n" for n in range(1520)) + "\n" * 80)

    counts = run(replace(config, prompt="{text}", max_tokens=8, num_actors="2"))
    # ids of Parquet are integers and those of CSV strings: both are one id, kept as a string
    rejected_rows = 400 + lost + 80
    assert counts["documents"] == 198_000 + 400 + 1600
    assert counts["documents"] == 200_000
    assert counts["rejected"] == rejected_rows
    assert counts["duplicates"] == 1000
    assert counts["embedded"] == 200_000 - rejected_rows - 1000
    ids = pads.dataset(f"{config.output}/embeddings").to_table(columns=["id"])["id"]
    assert len(ids) == 200_000 - rejected_rows
    assert ids.type == pa.string()
    assert len(ids.unique()) == len(ids)
    assert pads.dataset(f"{config.output}/rejected").count_rows() == rejected_rows


def test_metrics_are_served_to_prometheus(local_ray):
    Progress(10, 100).add({"texts": 5, "tokens": 50, "padded_tokens": 55, "failed": 0}, 50)
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + 120
    text = ""
    while "ray_shoal_padded_tokens_total" not in text and time.monotonic() < deadline:
        time.sleep(1)
        with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
    for name in ("embedded_texts_total", "embedded_tokens_total", "texts_left"):
        assert f"ray_shoal_{name}" in text


def test_a_progress_line_is_for_people(local_ray, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(100, 1000, rejected=3, _started=0.0)
    clock[0] = 40.0  # actors start, and a small chunk comes
    progress.add({"texts": 10, "tokens": 90, "padded_tokens": 100, "failed": 0}, 100)
    assert "left" not in progress.line()
    clock[0] = 50.0
    progress.add({"texts": 40, "tokens": 360, "padded_tokens": 400, "failed": 0}, 400)
    assert progress.line() == (
        "embed: 50 of 100 texts | 1.0 texts/s | 9 tokens/s | padding 10.0% | 3 rejected | 12 s left"
    )


# ---- without Ray


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rejected_fraction": 1.5}, "from 0 to 1"),
        ({"keep_columns": ("id",)}, "each column once"),
        ({"keep_columns": ("a", "a")}, "each column once"),
        ({"target_file_mib": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        EmbedConfig(**settings)


@pytest.mark.parametrize(
    ("resources", "nodes", "expected"),
    [
        ({"CPU": 2.0}, 3, (1, 1, 1.5, 0.0)),
        ({"CPU": 64.0}, 4, (63, 63, 1.0, 0.0)),
        ({"CPU": 128.0, "GPU": 64.0}, 8, (1, 64, 1.0, 1.0)),
    ],
)
def test_actors_are_found_from_the_resources(resources, nodes, expected):
    plan = plan_actors(resources, nodes)
    assert (plan.smallest, plan.largest, plan.cpus, plan.gpus) == expected


def test_actors_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="do not fit this Ray cluster of 2 CPUs"):
        plan_actors({"CPU": 2.0}, 1, cpus=2.0)
    with pytest.raises(InputError, match="give N, or MIN:MAX"):
        plan_actors({"CPU": 8.0}, 1, num_actors="3:1")


def test_files_of_the_result_are_even_and_hold_every_document_once():
    rng = np.random.default_rng(0)
    counts = [int(rng.integers(1, 300)) for _ in range(100)]
    chunks = [Chunk(f"00000-{n:04d}", rows, rows * 2336) for n, rows in enumerate(counts)]
    parts = plan_parts(chunks, target_bytes=1 << 20)
    sizes = [sum(stop - start for _, start, stop in runs) for runs in parts.values()]
    assert sum(sizes) == sum(counts)
    assert max(sizes) < 1.2 * min(sizes)
    seen = [(name, row) for runs in parts.values() for name, a, b in runs for row in range(a, b)]
    assert seen == [(chunk.name, row) for chunk in chunks for row in range(chunk.rows)]
