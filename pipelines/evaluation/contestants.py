"""What is compared: encoders named in one word, as plain values that travel to workers.

A contestant is given as a folder with an ``encoder.json`` (the output of embedding, fine-tuning
or selection), as ``NAME=VALUE`` settings of an encoder such as ``prompt=cluster,pooling=mean``, as
a baseline (``tf-idf``, ``all-MiniLM-L6-v2``, ``all-mpnet-base-v2``), as the folder of a
sentence-transformers model, or as a base model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic

from pipelines.encoder.describe import check_prompts, describe_encoder
from pipelines.encoder.description import EncoderConfig, EncoderDescription
from pipelines.encoder.sources import digest_folder, fetch_model
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import exists, join
from pipelines.runtime.machines import find_nodes
from pipelines.runtime.packaged import SENTENCE_ENCODERS
from pipelines.runtime.run_record import read_run, require_complete

TF_IDF = "tf-idf"
MINILM = "all-MiniLM-L6-v2"
_SETTING = re.compile(r"(?:^|,)(\w+)=")


@dataclass(frozen=True)
class Contestant:
    """One encoder to score.

    ``key`` tells it from all others and changes with it. ``kind`` is ``encoder`` with the content
    of its ``encoder.json`` as ``description``; ``sentence-transformers`` with its ``model``; or
    ``tf-idf``. ``prompts`` are those of single tasks; a peer's are its own.
    """

    label: str
    kind: str
    key: str
    description: Mapping[str, Any] | None = None
    model: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)


def parse_contestant(
    name: str, base: EncoderConfig, prompts: Mapping[str, str], device: str
) -> Contestant:
    """The contestant that ``name`` means.

    Args:
        name: as the module describes.
        base: gives the settings that ``name`` does not.
        prompts: prompts for some tasks in place of an encoder's own.
        device: where it will run.

    Raises :class:`InputError` for a name that means nothing.
    """
    if name == TF_IDF:
        return Contestant(TF_IDF, "tf-idf", TF_IDF)
    if name in SENTENCE_ENCODERS:
        return _peer(name, name)
    settings = _parse_settings(name)
    if settings is None:
        if exists(join(name, "encoder.json")):
            if read_run(name) is not None:
                require_complete(name)
            return encoder_contestant(EncoderDescription.load(name), prompts, label=name)
        if (Path(name).expanduser() / "modules.json").is_file():
            return _peer(Path(name).name, name)
        settings = {"model": name}
    config = _with_settings(base, settings, name)
    return encoder_contestant(describe_encoder(config, device=device), prompts)


def worker_device() -> str:
    """What encoders run on: GPUs, where the Ray cluster has any."""
    return "cuda" if find_nodes().resources()["GPU"] else "cpu"


def encoder_contestant(
    description: EncoderDescription, prompts: Mapping[str, str], *, label: str | None = None
) -> Contestant:
    """One of our encoders as a contestant.

    Raises :class:`InputError` where a task's prompt leaves a text too few of the model's positions.
    """
    from pipelines.evaluation.mteb import combined_fingerprint, label_of, stem

    check_prompts(description, set(prompts.values()))
    return Contestant(
        label=stem(label) if label else label_of(description),
        kind="encoder",
        key=combined_fingerprint(description, prompts),
        description=description.to_json(),
        prompts=dict(prompts),
    )


def load_contestant(contestant: Contestant, *, device: str, threads: int | None) -> Any:
    """The contestant as an encoder object for mteb."""
    from pipelines.evaluation.mteb import MtebEncoder, TfidfEmbedder, load_peer

    if contestant.kind == "tf-idf":
        return MtebEncoder(TfidfEmbedder())
    if contestant.kind == "sentence-transformers":
        folder = fetch_model(contestant.model).folder  # this node's, which may not be the driver's
        return load_peer(folder, contestant.label, device)
    assert contestant.description is not None
    return MtebEncoder.load(
        EncoderDescription.from_json(contestant.description),
        prompts=contestant.prompts,
        device=device,
        threads=threads,
    )


def distinct(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Each encoder once, with labels that differ."""
    once = list({contestant.key: contestant for contestant in contestants}.values())
    labels = Counter(contestant.label for contestant in once)
    return [replace(c, label=f"{c.label} {c.key[:6]}") if labels[c.label] > 1 else c for c in once]


def _peer(label: str, name: str) -> Contestant:
    """A sentence-transformers model, with the prompts that its folder gives tasks."""
    folder = fetch_model(name).folder
    settings = folder / "config_sentence_transformers.json"
    prompts = json.loads(settings.read_bytes()).get("prompts") if settings.is_file() else None
    return Contestant(
        label,
        "sentence-transformers",
        f"sha256-{digest_folder(folder)}",
        model=name,
        prompts={key: prompt for key, prompt in (prompts or {}).items() if prompt},
    )


def _parse_settings(name: str) -> dict[str, str] | None:
    """``{"prompt": "cluster"}`` of ``prompt=cluster``; None where ``name`` is no list of these."""
    found = list(_SETTING.finditer(name))
    known = EncoderConfig.__dataclass_fields__
    found = [match for match in found if match.group(1) in known]
    if not found or found[0].start() != 0:
        return None
    ends = [match.start() for match in found[1:]] + [len(name)]
    return {match.group(1): name[match.end() : end] for match, end in zip(found, ends, strict=True)}


def _with_settings(base: EncoderConfig, settings: Mapping[str, str], name: str) -> EncoderConfig:
    values: dict[str, Any] = dict(settings)
    if "layer" in values:
        values["layer"] = tuple(values["layer"].split("+"))
    try:
        return pydantic.TypeAdapter(EncoderConfig).validate_python(asdict(base) | values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"--compare {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}, "
            f"found {first['input']!r}"
        ) from error
