"""Whether an encoder uses an adapter as it was trained: same base, prompt, pooling and layers."""

from __future__ import annotations

from pipelines.encoding.encoder_description import EncoderDescription, trained_encoder
from pipelines.errors import InputError
from pipelines.model_sources import fetch_adapter

_OPTIONS = {"prompt": "prompt", "pooling": "pooling", "layers": "layer", "append_eos": "append-eos"}


def require_as_trained(
    description: EncoderDescription, adapter: str | None, *, action: str = "run"
) -> None:
    """Refuse an encoder that contradicts what ``adapter`` was trained with.

    An adapter that does not say (made elsewhere, without an ``encoder.json``) goes with any.

    Args:
        description: the encoder.
        adapter: a folder, local or remote, or a hub id; None is no adapter.
        action: what the encoder is for, a word for the error.

    Raises:
        InputError: another base model, prompt, pooling, layer or end-of-sequence token.
    """
    trained = None if adapter is None else trained_encoder(fetch_adapter(adapter).folder)
    if trained is None:
        return
    if _is_other_model(description.model_revision, trained.model_revision):
        raise InputError(
            f"adapter {adapter} was trained with another base model: {trained.model!r} "
            f"({trained.model_revision}), but this {action} has {description.model!r} "
            f"({description.model_revision}): pass --model {trained.model}"
        )
    for field, option in _OPTIONS.items():
        mine, theirs = getattr(description, field), getattr(trained, field)
        if mine != theirs:
            way = (
                "give --append-eos as in training"
                if field == "append_eos"
                else (f"leave --{option} out to take the adapter's")
            )
            raise InputError(
                f"adapter {adapter} was trained with another {field}: {theirs!r}, but this "
                f"{action} has {mine!r}: {way}, or use another adapter"
            )


def _is_other_model(found: str, trained: str) -> bool:
    """Whether two revisions differ; a digest of files and a hub commit cannot be compared."""
    same_kind = found.startswith("sha256:") == trained.startswith("sha256:")
    return same_kind and found != trained
