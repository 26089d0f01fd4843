"""Every writer's table of every type: embedded, clustered, and in the store of two nights."""

import tempfile
from pathlib import Path

import inline_ray
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nights import WORKERS, night, rows_of, text_of
from writers import KINDS, REFUSED, TYPES, VALUES, WRITERS, column_of

from cluster.clustering import cluster_corpus
from cluster.config import ClusterConfig
from pipelines.embedding import job as embed
from pipelines.embedding.config import EmbedConfig
from pipelines.runtime.run_record import RunRecord, read_run

ROWS = 24


@pytest.fixture(scope="module", autouse=True)
def no_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "WORKERS", WORKERS)
        inline_ray.run_inline(patch)
        yield


def table_of(writer, drawn):
    """Columns of hypothesis' values and one of every kind that the writer takes."""
    columns = {"id": pa.array(range(ROWS), pa.int64()), "text": [text_of(n) for n in range(ROWS)]}
    columns |= {name: pa.array(values, TYPES[name.removeprefix("a ")]) for name, values in drawn}
    for kind, (_, values) in KINDS.items():
        if kind not in REFUSED.get(writer, ()):
            repeated = [*values, None] * ROWS
            columns[kind] = column_of(kind, repeated[:ROWS])
    return pa.table(columns)


def run_job(job, function, config):
    record = RunRecord.of(job, config, keep_complete=True)
    with record:
        result = function(config, record)
        record.counts.update(result.counts)
    return read_run(config.output)["counts"]


def plain(rows, names):
    """Rows by id, of the kept columns alone."""
    return {row["id"]: {name: row[name] for name in names} for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
@settings(
    max_examples=3,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a failing example is slow, and not made smaller
)
@given(
    chunks=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    drawn=st.tuples(
        *(
            st.tuples(
                st.just(f"a {name}"),
                st.lists(st.none() | values, min_size=ROWS, max_size=ROWS),
            )
            for name, values in VALUES.items()
        )
    ),
)
def test_nothing_is_lost_on_the_way(tiny_model_folder, writer, chunks, drawn):
    table = table_of(writer, drawn)
    names = table.column_names[2:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        writer(folder / "in", table, chunks[0])
        config = EmbedConfig(
            corpus=f"{name}/in",
            output=f"{name}/run",
            model=str(tiny_model_folder),
            keep_columns=("text", *names),
            num_actors="1",
            dtype="float32",
        )
        counts = run_job("embed_corpus", embed.embed_corpus, config)
        assert (counts["documents"], counts["rejected"]) == (ROWS, 0)
        embedded = pads.dataset(f"{name}/run/embeddings").to_table()
        assert sorted(embedded["id"].to_pylist()) == list(range(ROWS))
        kept = plain(embedded.to_pylist(), ["text", *names])
        for row, wanted in enumerate(table.select(["text", *dict(drawn)]).to_pylist()):
            assert {column: kept[row][column] for column in wanted} == wanted
        for column in names:
            nulls = ROWS if column == "null" else table[column].null_count
            assert embedded[column].null_count == nulls, column

        options = ClusterConfig(
            embeddings=f"{name}/run",
            output=f"{name}/clusters",
            num_clusters="3",
            label_column="dictionary",
            keep_columns=tuple(names),
        )
        run_job("cluster_corpus", cluster_corpus, options)
        assigned = pads.dataset(f"{name}/clusters/assignments").to_table()
        assert sorted(assigned["id"].to_pylist()) == list(range(ROWS))
        mapped = pads.dataset(f"{name}/clusters/map.parquet").to_table().to_pylist()
        assert plain(mapped, names) == plain(embedded.to_pylist(), names)

        keep = tuple(names)
        night(f"{name}/in", f"{name}/store", tiny_model_folder, keep_columns=keep)
        assert plain(rows_of(f"{name}/store").values(), ["text", *names]) == kept
        for path in [*(folder / "in").rglob("*")]:  # the same rows in other pieces
            if path.is_file():
                path.unlink()
        writer(folder / "in", table, chunks[1])
        again = night(f"{name}/in", f"{name}/store", tiny_model_folder, keep_columns=keep)
        assert "nothing changed" in again.summary
