"""Nights over a corpus that brings its vectors along: whose they are, and who takes them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.files import Columns, CorpusFile
from pipelines.corpus.given_vectors import GivenVectors, first_width
from pipelines.corpus.readers import inspect_files, read_shard
from pipelines.embedding.job import shard_size
from pipelines.encoder.description import FILE_NAME, EncoderDescription
from pipelines.nightly.config import NightConfig
from pipelines.runtime.arrow import fingerprint_of
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import in_threads, open_filesystem, with_retries
from pipelines.runtime.machines import ActorPlan, find_nodes, plan_actors
from pipelines.runtime.units import configure_ray_data
from pipelines.store.columns import EMBEDDING
from pipelines.store.version import Version


def vector_takers() -> ActorPlan:
    """Workers that take vectors as they are: they need no GPU."""
    configure_ray_data()
    nodes = find_nodes()
    return plan_actors(nodes.resources(), nodes.count, gpus=0)


def describe_vectors(
    config: NightConfig, files: Sequence[CorpusFile], base: Version | None
) -> EncoderDescription:
    """Whose the vectors are that the corpus brings along.

    Of an encoder that is but a name the number of dimensions is the store's, else the first
    vector's. Raises :class:`InputError` for an ``encoder.json`` that is none, and where a file says
    that its vectors are of another encoder.
    """
    named = config.vectors_of
    if named.endswith(".json") or "/" in named:
        folder = named.removesuffix(FILE_NAME) or "."
        description = EncoderDescription.load(folder)
    else:
        width = 0 if base is None else base.schema.field(EMBEDDING).type.list_size
        description = EncoderDescription.elsewhere(named, width)
        if base is None or description.fingerprint != base.record.fingerprint:
            description = EncoderDescription.elsewhere(named, _first_width(config, files))
    claims = in_threads(_claimed_encoder, [file for file in files if file.format == "parquet"])
    for file, fingerprint in claims:
        if fingerprint not in ("", description.fingerprint):
            raise InputError(
                f"{file} says that its vectors are of encoder {fingerprint[:12]}, and --vectors-of "
                f"names {description.fingerprint[:12]}: name the encoder.json that lies beside it"
            )
    return description


def _first_width(config: NightConfig, files: Sequence[CorpusFile]) -> int:
    """How many numbers the first vector of the corpus has."""
    columns = Columns(config.text_column, config.id_column, (config.vector_column,))
    size = shard_size(files)
    for file in files:
        (seen,) = inspect_files([file], columns, shard_bytes=size, options=config.reading)
        for shard in () if seen.problem else seen.shards():
            for batch in read_shard(shard, columns):
                given = batch.kept
                width = first_width(given.column(0) if isinstance(given, pa.Table) else given[0])
                if width is not None:
                    return width
    raise InputError(f"column {config.vector_column!r} holds no vector in {files[0].path}")


def _claimed_encoder(file: CorpusFile) -> tuple[str, str]:
    """A Parquet file, and the fingerprint of the encoder of its vectors, empty if it says none."""
    filesystem, inner = open_filesystem(file.path)
    schema = with_retries(
        lambda: pq.read_schema(inner, filesystem=filesystem), file.path, reads=True
    )
    return file.path, fingerprint_of(schema)


def given_vectors(config: NightConfig, description: EncoderDescription) -> GivenVectors | None:
    """The column of vectors that the corpus brings along, if it does."""
    if not config.vector_column:
        return None
    return GivenVectors(
        config.vector_column, description.dimension, description.normalize, config.float16
    )


def source_of(config: NightConfig, fingerprint: str) -> str:
    """What tells vectors apart beside their texts: the encoder, or the column they come in."""
    return f"{fingerprint} in {config.vector_column}" if config.vector_column else fingerprint
