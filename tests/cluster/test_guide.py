"""The guide's way from embeddings to a cleaned, clustered corpus that takes newcomers."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_ray import run_inline

from cluster.clustering import cluster_corpus
from cluster.config import AssignConfig, ClusterConfig, DeduplicateConfig
from cluster.deduplication import deduplicate_corpus
from cluster.known import read_clustering
from cluster.newcomers import assign_clusters
from pipelines.runtime.command import parse
from pipelines.runtime.run_record import RunRecord

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
WORDS = {
    "camera": "lens picture zoom battery focus light screen sharp",
    "kettle": "water boil lid handle kitchen steam steel quiet",
    "jacket": "sleeve zip rain warm pocket size colour fabric",
}


def command(job, config_class):
    """The guide's first command of a job, as its settings."""
    block = next(b for b in re.findall(r"```bash\n(.*?)```", GUIDE, re.S) if f"/{job}.py" in b
                 and ("clean" in b or "topics" in b))  # fmt: skip
    return parse(config_class, shlex.split(block.replace("\\\n", " "))[2:])


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    run_inline(monkeypatch)
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    names = random.choice(sorted(WORDS), 240)
    texts = [" ".join(random.choice(WORDS[name].split(), 24)) for name in names]
    texts[200:] = texts[:40]
    centres = {name: 4 * np.eye(3, 8)[place] for place, name in enumerate(sorted(WORDS))}
    vectors = np.stack([centres[name] for name in names]) + random.normal(0, 0.5, (240, 8))
    folder = tmp_path / "runs" / "reviews" / "embeddings"
    folder.mkdir(parents=True)
    table = {
        "id": np.arange(240),
        "text": texts,
        "thing": names,
        "embedding": pa.array(vectors.astype(np.float32).tolist(), pa.list_(pa.float32(), 8)),
    }
    pq.write_table(pa.table(table), folder / "part-00000.parquet")
    return tmp_path / "runs"


def run(job, config, function):
    with RunRecord(config.output, job, asdict(config)) as record:
        return function(config, record)


def test_four_commands_clean_group_and_take_newcomers(reviews):
    cleaning = command("deduplicate_corpus", DeduplicateConfig)
    cleaned = run("deduplicate_corpus", cleaning, deduplicate_corpus)
    assert cleaned.counts["removed"] == 40
    grouping = command("cluster_corpus", ClusterConfig)
    run("cluster_corpus", grouping, cluster_corpus)
    levels = pq.read_table(reviews / "reviews-topics" / "levels.parquet").to_pylist()
    assert sum(row["parent_share"] for row in levels) == 6
    coarse = pq.read_table(reviews / "reviews-topics" / "clusters_3.parquet").to_pylist()
    found = [{name for name in WORDS if {*row["keywords"]} & {*WORDS[name].split()}}
             for row in coarse]  # fmt: skip
    assert sorted(found, key=min) == [{"camera"}, {"jacket"}, {"kettle"}]
    mapped = pq.read_table(reviews / "reviews-topics" / "map.parquet")
    assert mapped.num_rows == 200
    assert {"x", "y", "thing"} <= {*mapped.column_names}
    giving = command("assign_clusters", AssignConfig)
    given = run("assign_clusters", giving, lambda config, record: assign_clusters(
        config, record, read=lambda c: read_clustering(c.clusters, c.quantile)))  # fmt: skip
    assert given.counts["assigned"] + given.counts["noise"] == 240
