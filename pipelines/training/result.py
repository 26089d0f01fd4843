"""What a finished training run leaves: adapter, encoder, history, picture, model card, figures."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.sentence_transformers import export_sentence_transformer
from pipelines.encoder.sources import fetch_adapter, fetch_model, load_model_settings
from pipelines.runtime.files import atomic_output, join, write_bytes
from pipelines.runtime.run_record import package_versions
from pipelines.training.adapter import adapter_files
from pipelines.training.config import FinetuneConfig
from pipelines.training.loop import SCORE, TrainingState
from pipelines.training.trainer import MEASURES

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 640, 180, 56, 28, 44
_PANELS = (
    ("loss", "training loss", "#4c78a8"),
    ("heldout_loss", "held-out loss", "#f58518"),
    ("mrr", "held-out retrieval of the partner (MRR)", "#59a14f"),
    ("v_measure", "held-out V-measure", "#b07aa1"),
)


def plot_history(history: pa.Table, best_step: int) -> bytes:
    """One panel a measure over the steps, with a line at the best step.

    Args:
        history: columns ``step`` and some of ``loss``, ``heldout_loss``, ``mrr``,
            ``v_measure``, with nulls where there was no measure.
        best_step: the step of the adapter that is kept.
    """
    panels = [panel for panel in _PANELS if panel[0] in history.column_names]
    height = len(panels) * (_HEIGHT + _GAP) + _TOP
    steps = history["step"].to_pylist()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + _LEFT + 24}" '
        f'height="{height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, (name, title, color) in enumerate(panels):
        values = history[name].to_pylist()
        points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
        top = _TOP + place * (_HEIGHT + _GAP)
        parts += _panel(points, title, color, top, max(1, *steps), best_step)
    return "\n".join([*parts, "</svg>\n"]).encode()


def _panel(
    points: Sequence[tuple[int, float]],
    title: str,
    color: str,
    top: float,
    last_step: int,
    best_step: int,
) -> list[str]:
    low, high = min(v for _, v in points), max(v for _, v in points)
    spread = (high - low) or 1.0

    def at(step: float, value: float) -> str:
        x = _LEFT + _WIDTH * step / last_step
        return f"{x:.1f},{top + _HEIGHT * (1 - (value - low) / spread):.1f}"

    line = " ".join(at(step, value) for step, value in points)
    best = _LEFT + _WIDTH * best_step / last_step
    marks = [
        f'<circle cx="{xy.split(",")[0]}" cy="{xy.split(",")[1]}" r="2.5" fill="{color}"/>'
        for xy in line.split()
    ]
    return [
        f'<text x="{_LEFT}" y="{top - 8}" font-weight="bold">{html.escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" '
        'stroke="#ccc"/>',
        f'<text x="{_LEFT - 6}" y="{top + 10}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{_LEFT - 6}" y="{top + _HEIGHT}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{_LEFT + _WIDTH}" y="{top + _HEIGHT + 16}" text-anchor="end">'
        f"step {last_step}</text>",
        f'<line x1="{best:.1f}" x2="{best:.1f}" y1="{top}" y2="{top + _HEIGHT}" stroke="#e15759" '
        'stroke-dasharray="4 3"/>',
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>',
        *(marks if len(points) < 60 else []),
    ]


_TEMPLATE = """\
---
base_model: {{ encoder.model | tojson }}
library_name: peft
pipeline_tag: feature-extraction
tags: [lora, sentence-embeddings, clustering]
---
# Adapter for clustering texts

A LoRA adapter trained contrastively, without labels, to place texts of like content close together.

| what | value |
| --- | --- |
| base model | `{{ encoder.model }}`, {{ encoder.model_revision }} |
| prompt | `{{ encoder.prompt }}` |
| pooling, layers | {{ encoder.pooling }}, {{ encoder.layers | join(", ") }} |
| dimension | {{ encoder.dimension }}{{ ", also good when cut to " ~ shorter if shorter }} |
| pairs | {{ source }}: {{ counts.training_pairs }} for training, \
{{ counts.heldout_pairs }} held out |
| loss | InfoNCE over {{ config.batch_pairs }} pairs a step, temperature {{ config.temperature }}\
{{ " at the start, learned" if config.learn_temperature }} |
| LoRA | rank {{ config.lora_rank }}, alpha {{ config.lora_alpha }}, dropout \
{{ config.lora_dropout }}, on {{ config.lora_targets | join(", ") }} |
| optimizer | AdamW, learning rate {{ config.learning_rate }}, {{ config.warmup_steps }} warm-up \
steps, then linear decay |
| steps | {{ metrics.steps }}; kept is step {{ metrics.best_step }}, the best by held-out loss |
| tokens | {{ metrics.training_tokens }} |
| seed | {{ config.seed }} |
| made with | {{ versions }} |

## Held-out pairs

| step | {{ columns | join(" | ") }} |
| --- |{{ " --- |" * columns | length }}
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
![history](history.svg)

`heldout_loss` is the objective of training on pairs that are held out (lower is better);
`recall_at_1` and `mrr` ask for a text's partner among all held-out partners (higher is better);
`alignment` is the mean squared distance of partners, `uniformity` says how evenly vectors spread
(lower is better for both).

## Use

Vectors mean what they should only with the prompt and the pooling above, which `encoder.json`
holds:

```
python jobs/embed_corpus.py --adapter THIS_FOLDER --model {{ encoder.model }} \\
    --prompt {{ encoder.prompt | quote }} --pooling {{ encoder.pooling }}
```

```python
import peft, transformers

base = transformers.AutoModel.from_pretrained("BASE_MODEL_FOLDER")
model = peft.PeftModel.from_pretrained(base, "THIS_FOLDER")
```

## Licence

The adapter's weights derive from the base model and from the training texts; the licences of both
apply. The base model's is {{ licence }}.
"""
_KNOWN_LICENCES = {"smollm2-135m-instruct": "Apache-2.0"}


def write_model_card(
    config: FinetuneConfig,
    encoder: EncoderDescription,
    counts: dict[str, int],
    metrics: dict[str, Any],
    history: pa.Table,
) -> str:
    """The card as Markdown."""
    columns = [name for name in ("loss", *MEASURES) if name in history.column_names]
    rows = [
        [row["step"], *("" if row[name] is None else f"{row[name]:.3f}" for name in columns)]
        for row in history.to_pylist()
        if row["heldout_loss"] is not None
    ]
    source = config.pairs or f"crops of {config.corpus or 'the packaged training corpus'}"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["quote"] = shlex.quote
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(_TEMPLATE).render(
        config=config,
        encoder=encoder,
        counts=counts,
        metrics=metrics,
        columns=columns,
        rows=rows,
        source=source,
        shorter=", ".join(map(str, config.dimensions)),
        versions=", ".join(f"{name} {version}" for name, version in package_versions().items()),
        licence=_KNOWN_LICENCES.get(encoder.model, "stated where the base model comes from"),
    )


def measure_run(state: TrainingState, seconds: float) -> dict[str, Any]:
    """Figures of a finished run for ``run.json``."""
    steps = [row for row in state.history if row["step"] > 0]
    measured = {row["step"]: row for row in state.history if SCORE in row}
    tokens = sum(row["tokens"] for row in steps)
    best = measured[state.best_step]
    return {
        "steps": state.step,
        "best_step": state.best_step,
        "before": _measures(measured[0]),
        "best": _measures(best),
        "training_tokens": int(tokens),
        "tokens_per_second": round(tokens / sum(row["seconds"] for row in steps), 1),
        "seconds": round(seconds, 1),
    }


def write_result(
    config: FinetuneConfig,
    description: EncoderDescription,
    state: TrainingState,
    counts: dict[str, int],
    metrics: dict[str, Any],
) -> None:
    """Write the best adapter, its encoder, the history and the model card."""
    settings = load_model_settings(
        fetch_model(config.model, config.revision).folder, config.trust_remote_code
    )
    files = adapter_files(
        config.trainer,
        description,
        state.best_weights,
        all_layers=max(description.layers) == settings.num_hidden_layers,
    )
    for name, content in files.items():
        write_bytes(join(config.output, name), content)
    names = dict.fromkeys(name for row in state.history for name in row)
    history = pa.table({name: [row.get(name) for row in state.history] for name in names})
    with atomic_output(join(config.output, "history.parquet")) as sink:
        pq.write_table(history, sink)
    write_bytes(join(config.output, "history.svg"), plot_history(history, state.best_step))
    tuned = describe_tuned(config, description)
    tuned.save(config.output)
    if config.sentence_transformers:
        folder = Path(config.output).expanduser() / "sentence_transformers"
        export_sentence_transformer(tuned, folder)
    card = write_model_card(config, tuned, counts, metrics, history)
    write_bytes(join(config.output, "README.md"), card.encode())


def describe_tuned(config: FinetuneConfig, base: EncoderDescription) -> EncoderDescription:
    """The encoder that the adapter makes of its base model."""
    output = config.output
    folder = output if "://" in output else str(Path(output).expanduser().absolute())
    return replace(base, adapter=folder, adapter_revision=fetch_adapter(folder).revision)


def summarize(
    config: FinetuneConfig, counts: dict[str, int], metrics: dict[str, Any]
) -> dict[str, str]:
    """The table that a person sees at the end."""
    before, best = metrics["before"], metrics["best"]
    changes = {
        f"held-out {name.removeprefix('heldout_')}": f"{before[name]:.3f} before, {value:.3f} tuned"
        for name, value in best.items()
    }
    return {
        "pairs": f"{counts['training_pairs']:,} to train, {counts['heldout_pairs']:,} held out",
        "steps": f"{metrics['steps']}, best at {metrics['best_step']}",
        **changes,
        "tokens a second": f"{metrics['tokens_per_second']:,.0f}",
        "output": config.output,
    }


def _measures(row: dict[str, Any]) -> dict[str, float]:
    return {name: round(row[name], 4) for name in MEASURES if name in row}
