"""What a finished training run leaves: adapter, encoder, history, picture, model card, figures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import vl_convert
from huggingface_hub import ModelCardData

from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.sentence_transformers import export_sentence_transformer
from pipelines.encoder.sources import fetch_adapter, fetch_model, load_model_settings
from pipelines.runtime.files import join, write_bytes, write_table
from pipelines.runtime.run_record import package_versions
from pipelines.training.adapter import adapter_files
from pipelines.training.config import FinetuneConfig
from pipelines.training.loop import SCORE, TrainingState
from pipelines.training.loss import TEACHING
from pipelines.training.trainer import MEASURES, half_agreement

_PANELS = {
    "loss": ("training loss", "#4c78a8"),
    "heldout_loss": ("held-out loss", "#f58518"),
    "mrr": ("held-out retrieval of the partner (MRR)", "#59a14f"),
    "half_agreement": ("held-out agreement of partners' clusters", "#8c6d31"),
    "teacher_agreement": ("held-out agreement with the teacher", "#76b7b2"),
    "v_measure": ("held-out V-measure", "#b07aa1"),
}
_MOST_POINTS = 60
_VEGA_LITE = "https://vega.github.io/schema/vega-lite/v5.json"


def plot_history(history: pa.Table, best_step: int) -> bytes:
    """An SVG of one panel a measure over the steps, with a line at the best step.

    Args:
        history: columns ``step`` and some of ``loss``, ``heldout_loss``, ``mrr``,
            ``half_agreement``, ``teacher_agreement``, ``v_measure``, with nulls where there was
            no measure.
        best_step: the step of the adapter that is kept.
    """
    steps = history["step"].to_pylist()
    panels = [
        _panel(
            [{"step": step, "value": value}
             for step, value in zip(steps, history[name].to_pylist(), strict=True)
             if value is not None],
            title, color, max(1, *steps), best_step,
        )
        for name, (title, color) in _PANELS.items()
        if name in history.column_names
    ]  # fmt: skip
    spec = {
        "$schema": _VEGA_LITE,
        "background": "white",
        "vconcat": panels,
        "config": {"font": "sans-serif"},
    }
    return vl_convert.vegalite_to_svg(spec).encode()


def _panel(
    points: list[dict[str, float]], title: str, color: str, last_step: int, best_step: int
) -> dict[str, Any]:
    steps = {"field": "step", "type": "quantitative", "scale": {"domain": [0, last_step]}}
    values = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    line = {
        "type": "line",
        "color": color,
        "point": len(points) < _MOST_POINTS and {"color": color},
    }
    best = {"type": "rule", "color": "#e15759", "strokeDash": [4, 3]}
    return {
        "title": {"text": title, "anchor": "start"},
        "width": 640,
        "height": 160,
        "layer": [
            {"data": {"values": points}, "mark": line, "encoding": {"x": steps, "y": values}},
            {"data": {"values": [{"step": best_step}]}, "mark": best, "encoding": {"x": steps}},
        ],
    }


_TEMPLATE = """\
---
{{ front_matter }}
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
{%- if config.teacher %}
| teacher | `{{ config.teacher }}`, fingerprint {{ metrics.teacher_fingerprint }}: \
{{ teaching }} times one minus the agreement with it |
{%- endif %}
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
{% if config.teacher -%}
`teacher_agreement` is the correlation of a text's cosines to the other texts by this encoder with
those by the teacher (higher is better);
{% endif -%}
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
_KNOWN_LICENCES = {"smollm2-135m-instruct": "Apache-2.0", "gemma3-270m": "Gemma Terms of Use"}


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
    source = config.pairs or f"pairs of {config.corpus or 'the packaged training corpus'}"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["quote"] = shlex.quote
    return environment.from_string(_TEMPLATE).render(
        config=config,
        teaching=TEACHING,
        front_matter=ModelCardData(
            base_model=encoder.model,
            library_name="peft",
            pipeline_tag="feature-extraction",
            tags=["lora", "sentence-embeddings", "clustering"],
        ).to_yaml(),
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


_RESAMPLES = 200


def measure_gain(state: TrainingState) -> dict[str, Any] | None:
    """What the kept adapter gained on held-out pairs, without a label, with standard errors.

    ``heldout_loss``, ``mrr``, ``half_agreement``, ``topics``, the mean of these two, and with a
    teacher ``teacher_agreement``, each with ``gain`` (for the loss a gain is negative) and
    ``error``, over resamples of the pairs that are the same before and after. None for a run that
    has no measures by pair.
    """
    if not state.start or not state.best:
        return None
    pairs = len(state.start["heldout_loss"])
    draws = np.random.default_rng(0).integers(0, pairs, (_RESAMPLES, pairs))
    once = _differences(state, np.arange(pairs))
    drawn = [_differences(state, draw) for draw in draws]
    return {
        name: {
            "gain": round(value, 4),
            "error": round(float(np.std([draw[name] for draw in drawn], ddof=1)), 4),
        }
        for name, value in once.items()
    }


def _differences(state: TrainingState, places: np.ndarray) -> dict[str, float]:
    before, after = _means(state.start, places), _means(state.best, places)
    return {name: after[name] - value for name, value in before.items()}


def _means(detail: Mapping[str, Any], places: np.ndarray) -> dict[str, float]:
    names = [name for name in (SCORE, "mrr", "teacher_agreement") if name in detail]
    means = {name: float(np.take(detail[name], places).mean()) for name in names}
    runs = [[np.take(side, places) for side in run] for run in detail["clusters"]]
    agreement = half_agreement(runs)
    return {**means, "half_agreement": agreement, "topics": (means["mrr"] + agreement) / 2}


def judge_gain(
    gain: Mapping[str, Mapping[str, float]],
    best_step: int,
    made_by: Mapping[str, int] | None = None,
) -> str:
    """Whether to use the adapter, in one sentence; ``made_by`` counts pairs by their method.

    Two halves of a headline have little in common: pairs of them that find each other better are
    no sign that labels do.
    """
    judged = gain[judged_by(gain)]
    if best_step == 0:
        return "none: no step was better, keep the encoder as it was"
    made_by = made_by or {}
    if judged_by(gain) == "topics" and made_by.get("crop", 0) < sum(made_by.values()) / 2:
        return "no proof, as most texts are short: compare with the encoder as it was before use"
    if judged["gain"] < 2 * judged["error"]:
        return "within its error: try both encoders, or more and other text"
    return "more than twice its error: use the adapter"


def judged_by(gain: Mapping[str, Any]) -> str:
    """The gain that decides: in agreement with the teacher, where there is one, else in topics."""
    return "teacher_agreement" if "teacher_agreement" in gain else "topics"


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
        "gain": measure_gain(state),
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
        kept_start=state.best_step == 0,
    )
    for name, content in files.items():
        write_bytes(join(config.output, name), content)
    names = dict.fromkeys(name for row in state.history for name in row)
    history = pa.table({name: [row.get(name) for row in state.history] for name in names})
    write_table(join(config.output, "history.parquet"), history)
    write_bytes(join(config.output, "history.svg"), plot_history(history, state.best_step))
    tuned = describe_tuned(config, description)
    tuned.save(config.output)
    if config.sentence_transformers and (
        state.best_step or metrics["start_adapter"]
    ):  # it changes something
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
    gain = metrics.get("gain")
    if gain:
        name = judged_by(gain)
        changes[f"gain in {name.replace('_', ' ')}, without labels"] = (
            f"{gain[name]['gain']:+.3f} ± {gain[name]['error']:.3f}, "
            f"{judge_gain(gain, metrics['best_step'], metrics.get('made_by'))}"
        )
    made_by = ", ".join(f"{n:,} by {how}" for how, n in metrics.get("made_by", {}).items())
    labels = counts.get("label_pairs")
    start = metrics.get("start_adapter")
    return {
        "pairs": f"{counts['training_pairs']:,} to train, {counts['heldout_pairs']:,} held out",
        **({"made of the corpus": made_by} if made_by else {}),
        **({"pairs of one label": f"{labels:,}"} if labels else {}),
        "began with": f"the adapter {start}" if start else "a new adapter",
        "steps": f"{metrics['steps']}, best at {metrics['best_step']}",
        **changes,
        "tokens a second": f"{metrics['tokens_per_second']:,.0f}",
        "output": config.output,
    }


def _measures(row: dict[str, Any]) -> dict[str, float]:
    return {name: round(row[name], 4) for name in MEASURES if name in row}
