"""Nights over a corpus that brings its vectors along: whose they are, and who takes them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from cluster.vector_columns import vector_length
from pipelines.corpus.columnar import TYPED_FORMATS, columns_of
from pipelines.corpus.files import Columns, CorpusFile
from pipelines.corpus.given_vectors import GivenVectors, first_width
from pipelines.corpus.readers import inspect_files, read_shard
from pipelines.embedding.job import shard_size
from pipelines.encoder.description import FILE_NAME, EncoderDescription
from pipelines.nightly.config import NightConfig
from pipelines.runtime.arrow import fingerprint_of
from pipelines.runtime.errors import InputError, StorageError
from pipelines.runtime.files import in_threads, with_retries
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
    vector's. Raises :class:`InputError` for an ``encoder.json`` that is none, for a column of other
    than vectors, and where a file says that its vectors are of another encoder.
    """
    named = config.vectors_of
    typed = [file for file in files if file.format in TYPED_FORMATS]
    claims = in_threads(lambda file: _claimed_encoder(config.vector_column, file), typed)
    if named.endswith(".json") or "/" in named:
        folder = named.removesuffix(FILE_NAME) or "."
        description = EncoderDescription.load(folder)
    else:
        width = 0 if base is None else base.schema.field(EMBEDDING).type.list_size
        description = EncoderDescription.elsewhere(named, width)
        if base is None or description.fingerprint != base.record.fingerprint:
            description = EncoderDescription.elsewhere(named, _first_width(config, files))
    for file, fingerprint in zip(typed, claims, strict=True):
        if fingerprint not in ("", description.fingerprint):
            raise InputError(
                f"{file.path} says that its vectors are of encoder {fingerprint[:12]}, and "
                f"--vectors-of names {description.fingerprint[:12]}: name the encoder.json that "
                "lies beside it"
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


def _claimed_encoder(name: str, file: CorpusFile) -> str:
    """The fingerprint of the encoder that a file says its vectors are of, empty if it says none.

    Raises :class:`InputError` where its column ``name`` is none of vectors.
    """
    try:
        about = with_retries(lambda: columns_of(file), file.path, decodes=True)
    except StorageError:
        raise
    except (OSError, pa.ArrowException):
        return ""  # looking into the file will say why
    if name in about.schema.names:
        vector_length(about, name, file.path, flag="--vector-column")
        if pa.types.is_struct(about.schema.field(name).type):
            raise InputError(
                f"{file.path}: column {name!r} holds Spark's VectorUDT; required is a list of "
                "numbers: write vector_to_array of it"
            )
    return fingerprint_of(about.own)


def given_vectors(config: NightConfig, description: EncoderDescription) -> GivenVectors | None:
    """The column of vectors that the corpus brings along, if it does."""
    if not config.vector_column:
        return None
    return GivenVectors(
        config.vector_column,
        description.dimension,
        description.normalize,
        config.float16,
        config.metric == "cosine",
    )


def source_of(config: NightConfig, fingerprint: str) -> str:
    """What tells vectors apart beside their texts: the encoder, or the column they come in.

    By cosine other vectors of a column are rejected.
    """
    if not config.vector_column:
        return fingerprint
    return f"{fingerprint} in {config.vector_column} by {config.metric}"
