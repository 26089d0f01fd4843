"""What an encoder's last token looks at, before and after tuning.

In: a base model, adapters, and one text or a corpus. Out: ``attention.parquet`` (a row a token:
``encoder``, ``document``, ``position``, ``token_id``, ``token``, ``part``, ``kind``, ``layer``,
``attention``), ``shares.json``, and the picture as ``attention.png`` and ``attention.svg``. The
analysis is that of arXiv:2507.22729: attention of the last token in the last layer, heads averaged,
over prompt and body.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipelines.corpus.sample import sample_corpus
from pipelines.encoder.decoder import load_described_model
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.encoder import token_budget_batches
from pipelines.encoder.padded import find_layers, pad_right
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.evaluation.config import AttentionConfig
from pipelines.evaluation.contestants import worker_device
from pipelines.evaluation.figure import draw_attention
from pipelines.evaluation.token_kinds import (
    PromptedToken,
    describe_tokens,
    group_shares,
    shift,
    summarize,
)
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    join,
    json_bytes,
    make_folder,
    read_bytes,
    remove_folder,
    write_bytes,
    write_table,
)
from pipelines.runtime.packaged import demo_corpus
from pipelines.runtime.run_record import RunRecord
from pipelines.runtime.segments import bytes_to_table, table_to_bytes
from pipelines.runtime.units import Receipt, configure_ray_data, plan_unit_actors, run_actor_stage

# All heads' weights of all layers up to the wanted one are held at once.
_MOST_WEIGHTS = 1 << 27


def load_eager(description: EncoderDescription, device: torch.device) -> Any:
    """An encoder's base model, adapter merged, with attention that gives its weights.

    Layers above the one that is read, the single one of ``description.layers``, are not run.

    Raises :class:`InputError` for a model without such attention.
    """
    model = load_described_model(description, device)
    try:
        model.set_attn_implementation("eager")
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"{description.model}: this model cannot give its attention weights: {error}"
        ) from error
    stack = find_layers(model)
    del stack[description.layers[0] :]
    return model


@torch.inference_mode()
def last_token_attention(
    model: Any, token_ids: Sequence[Sequence[int]], layer: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Place of a text and its last token's weights, float32 (tokens,), which sum to 1.

    Args:
        model: what :func:`load_eager` gave.
        token_ids: texts within their prompts.
        layer: which layer's attention, from 1.

    Longest texts come first. Raises :class:`InputError` where the model gives no weights.
    """
    settings = model.config.get_text_config()
    device = next(model.parameters()).device
    lengths = [len(ids) for ids in token_ids]
    a_token = layer * settings.num_attention_heads * max(lengths)
    for batch in token_budget_batches(lengths, max(1, _MOST_WEIGHTS // a_token)):
        input_ids, mask = pad_right([token_ids[index] for index in batch], device)
        output = model(
            input_ids=input_ids,
            attention_mask=mask.long(),
            output_attentions=True,
            use_cache=False,
        )
        if not output.attentions or output.attentions[layer - 1] is None:
            raise InputError(f"{type(model).__name__} gives no attention weights")
        weights = output.attentions[layer - 1].float().mean(dim=1)  # heads
        for place, index in enumerate(batch):
            last = lengths[index] - 1
            yield index, weights[place, last, : last + 1].cpu().numpy()


UNTUNED = "untuned"
WORK_FOLDER = "_work"
SCHEMA = pa.schema(
    [
        ("encoder", pa.string()),
        ("document", pa.string()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("token", pa.string()),
        ("part", pa.string()),
        ("kind", pa.string()),
        ("layer", pa.int32()),
        ("attention", pa.float32()),
    ]
)


def inspect_attention(config: AttentionConfig, record: RunRecord) -> JobResult:
    """Write table and picture of a model's attention, without an adapter and with each.

    Raises :class:`InputError` for models, adapters and corpora that do not do, and for a model
    that does not give its attention weights.
    """
    configure_ray_data()
    work = join(config.output, WORK_FOLDER)
    encoders = describe_encoders(config)
    documents, texts = find_texts(config, work)
    content = json.dumps([documents, texts]).encode()
    state = hashlib.sha256(content).hexdigest()[:12]
    write_bytes(join(work, "texts.json"), content)
    make_folder(join(work, "tables"))
    units = {
        f"{number:02d}-{description.fingerprint[:16]}-{state}": {
            "label": label, "description": description.to_json()
        }
        for number, (label, description) in enumerate(encoders.items())
    }  # fmt: skip
    count, cpus = plan_unit_actors(len(units), num_actors=0, cpus=None)
    run_actor_stage(
        work,
        "attend",
        units,
        functools.partial(attend_unit, work),
        functools.partial(torch.set_num_threads, max(1, round(cpus))),
        num_actors=count,
        cpus=cpus,
    )
    tables = [bytes_to_table(read_bytes(join(work, "tables", f"{name}.arrow"))) for name in units]
    return write_outcome(config, record, pa.concat_tables(tables), list(encoders))


def describe_encoders(config: AttentionConfig) -> dict[str, EncoderDescription]:
    """The model without an adapter and with each, by labels that differ."""
    device = worker_device()
    encoders = {UNTUNED: describe_encoder(config.encoder(None), device=device)}
    names = [adapter.rstrip("/").rpartition("/")[2] for adapter in config.adapters]
    repeated = Counter(names)
    for number, (adapter, name) in enumerate(zip(config.adapters, names, strict=True), start=1):
        label = f"{number} {name}" if repeated[name] > 1 or name == UNTUNED else name
        encoders[label] = describe_encoder(config.encoder(adapter), device=device)
    return encoders


def find_texts(config: AttentionConfig, work: str) -> tuple[list[str], list[str]]:
    """Ids and texts of the documents to look at."""
    if config.text:
        return ["text"], [config.text]
    sample = sample_corpus(
        config.corpus or str(demo_corpus()), work, text_column=config.text_column,
        id_column=config.id_column, documents=config.documents, seed=config.seed,
        options=config.reading,
    )  # fmt: skip
    return sample.documents["id"].to_pylist(), sample.texts


def attend_unit(work: str, name: str, unit: Mapping[str, Any], _: Any) -> Receipt:
    """Attention of one encoder over all texts, written as one table."""
    description = EncoderDescription.from_json(unit["description"])
    documents, texts = json.loads(read_bytes(join(work, "texts.json")))
    tokenizer = PromptedTokenizer.load(description)
    token_ids = tokenizer.tokenize(texts)
    if not all(token_ids):
        raise InputError("a text is empty and has no prompt: there is nothing to attend to")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_eager(description, device)
    (layer,) = description.layers
    weights = dict(last_token_attention(model, token_ids, layer))
    tables = []
    for index, document in enumerate(documents):
        tokens = describe_tokens(
            tokenizer.tokenizer, token_ids[index], tokenizer.prefix_tokens, tokenizer.suffix_tokens
        )
        tables.append(token_table(unit["label"], document, tokens, weights[index], layer))
    table = pa.concat_tables(tables)
    path = join(work, "tables", f"{name}.arrow")
    write_bytes(path, table_to_bytes(table), create_folder=False)
    return {"tokens": len(table)}


def token_table(
    encoder: str, document: str, tokens: Sequence[PromptedToken], weights: Any, layer: int
) -> pa.Table:
    """The rows of ``attention.parquet`` of one text."""
    columns = {
        "encoder": [encoder] * len(tokens),
        "document": [document] * len(tokens),
        "position": range(len(tokens)),
        "token_id": [token.token_id for token in tokens],
        "token": [token.text for token in tokens],
        "part": [token.part for token in tokens],
        "kind": [token.kind for token in tokens],
        "layer": [layer] * len(tokens),
        "attention": weights,
    }
    return pa.table(columns, schema=SCHEMA)


def shares_by_text(table: pa.Table, encoder: str) -> dict[str, dict[str, float]]:
    """An encoder's attention on each group of tokens, for every document."""
    texts: dict[str, tuple[list[PromptedToken], list[float]]] = {}
    for row in table.filter(pc.field("encoder") == encoder).to_pylist():
        tokens, weights = texts.setdefault(row["document"], ([], []))
        tokens.append(PromptedToken(row["token_id"], row["token"], row["part"], row["kind"]))
        weights.append(row["attention"])
    return {
        name: group_shares(tokens, np.array(weights)) for name, (tokens, weights) in texts.items()
    }


def write_outcome(
    config: AttentionConfig, record: RunRecord, table: pa.Table, encoders: Sequence[str]
) -> JobResult:
    """Write the table, the shares and the picture; the job's short table."""
    by_text = {label: shares_by_text(table, label) for label in encoders}
    lists = {label: list(texts.values()) for label, texts in by_text.items()}
    shares = {label: summarize(texts) for label, texts in lists.items()}
    shifts = {label: shift(lists[UNTUNED], lists[label]) for label in encoders[1:]}
    counts = {"texts": len(lists[UNTUNED]), "encoders": len(encoders), "tokens": len(table)}
    metrics = {"layer": table["layer"][0].as_py(), "shares": shares, "shift": shifts}
    content = {**metrics, "texts": counts["texts"]}
    write_bytes(join(config.output, "shares.json"), json_bytes(content))
    write_table(join(config.output, "attention.parquet"), table)
    picture = draw_attention(table, shares)
    write_bytes(join(config.output, "attention.png"), picture.png)
    write_bytes(join(config.output, "attention.svg"), picture.svg.encode())
    record.complete(counts, metrics)
    remove_folder(join(config.output, WORK_FOLDER))
    summary = {
        label: ", ".join(
            [
                f"prompt {found['prompt']['mean']:.1%}",
                f"content words {found['content']['mean']:.1%}",
                f"(first token apart, {found['first token']['mean']:.1%})",
            ]
        )
        for label, found in shares.items()
    }
    return JobResult(counts, metrics, {**summary, "output": config.output})
