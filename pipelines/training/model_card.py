"""The model card of an adapter: base, data, settings, curve, licence, and how to load it."""

from __future__ import annotations

import json
import shlex
from typing import Any

import jinja2
import pyarrow as pa

from pipelines.encoding.encoder_description import EncoderDescription
from pipelines.run_record import package_versions
from pipelines.training.finetune_config import FinetuneConfig
from pipelines.training.heldout import MEASURES

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
