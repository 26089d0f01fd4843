"""What a finished training run leaves: adapter, encoder, history, picture, model card, figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.encoding.encoder_description import (
    EncoderDescription,
    describe_encoder,
    load_model_settings,
)
from pipelines.encoding.sentence_transformers_folder import export_sentence_transformer
from pipelines.model_sources import fetch_model
from pipelines.storage import atomic_output, join, write_bytes
from pipelines.training.adapter_model import adapter_files
from pipelines.training.finetune_config import FinetuneConfig
from pipelines.training.heldout import MEASURES
from pipelines.training.history_plot import plot_history
from pipelines.training.model_card import write_model_card
from pipelines.training.training_loop import SCORE
from pipelines.training.training_state import TrainingState


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
    settled = replace(
        config.encoder, adapter=folder, prompt=base.prompt, pooling=base.pooling,
        layer=base.layers, dtype=base.dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    return describe_encoder(settled)


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
