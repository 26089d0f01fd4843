"""How fast texts become vectors, beside the usual ways and the machine's own bound.

    python benchmarks/encode.py

Takes the packaged model and 20 Newsgroups, the same texts, prompt and threads for every way. The
ways take turns on slices of the texts, so that a machine whose load changes slows all of them
alike. The usual ways run in a process of their own, where nothing of Shoal has changed how memory
is allocated. Prints a table and writes ``benchmarks/results/encode.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import sentence_transformers
import torch
import transformers
from rich.console import Console
from rich.table import Table

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.sentence_transformers import export_sentence_transformer
from pipelines.encoder.sources import PACKAGED_MODEL, fetch_model
from pipelines.runtime.packaged import load_labelled_corpus

RESULTS = Path(__file__).parent / "results" / "encode.json"
PROMPT = "one-word"
MATRIX_SIZE, MATRIX_PRODUCTS = 2048, 20
SHORT_TOKENS = 20
REFERENCE = "Shoal, float32"
OURS = {
    "Shoal, float32": ("float32", False),
    "Shoal, bfloat16": ("bfloat16", False),
    "Shoal, int8": ("int8", False),
    "Shoal, int8, compiled": ("int8", True),
}


Encode = Callable[[list[str]], np.ndarray]
# Vectors, seconds and CPU seconds.
Timed = tuple[np.ndarray, float, float]


@dataclass
class Way:
    """One way to encode, and what it did."""

    name: str
    timed: Callable[[list[str]], Timed]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    vectors: list[np.ndarray] = field(default_factory=list)

    def run(self, texts: list[str]) -> None:
        """Encode some more texts, on the clock."""
        vectors, seconds, cpu_seconds = self.timed(texts)
        self.vectors.append(vectors)
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds


def on_the_clock(encode: Encode, texts: list[str]) -> Timed:
    """Encode texts in this process."""
    started, cpu_started = time.perf_counter(), time.process_time()
    vectors = encode(texts)
    return vectors, time.perf_counter() - started, time.process_time() - cpu_started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--slice", type=int, default=32, help="texts a way encodes in its turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the other process too
    torch.set_num_threads(arguments.threads)
    corpus = load_labelled_corpus("20newsgroups", "test")["text"].to_pylist()
    texts = corpus[:: len(corpus) // arguments.texts][: arguments.texts]
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "machine": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
            "threads": arguments.threads,
            "texts": len(texts),
            "natural lengths, cut at 256 tokens": compare(texts, 256, arguments.slice, folder),
            f"short, cut at {SHORT_TOKENS} tokens": compare(
                texts, SHORT_TOKENS, arguments.slice, folder, paper=False
            ),
        }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    for name, content in results.items():
        if isinstance(content, dict):
            show(name, content)


def compare(
    texts: list[str], max_tokens: int, size: int, folder: str, *, paper: bool = True
) -> dict[str, Any]:
    """Encode the same texts every way, in turns; rates in tokens a second."""
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(
        target=serve_usual_ways, args=(theirs, max_tokens, folder, paper), daemon=True
    )
    process.start()
    theirs.close()  # else a process that ended would be waited for, for ever
    ways = [Way(name, ask(connection, name)) for name in connection.recv()]
    ours = {
        name: Encoder.load(
            EncoderConfig(prompt=PROMPT, max_tokens=max_tokens, dtype=dtype),  # type: ignore[arg-type]
            device="cpu",
            compile_model=compiled,
        )
        for name, (dtype, compiled) in OURS.items()
    }
    ways += [Way(name, partial(on_the_clock, encoder.encode)) for name, encoder in ours.items()]
    bounds = [
        Way(name, partial(on_the_clock, multiply(name))) for name in ("float32", "bfloat16", "int8")
    ]
    for way in [*ways, *bounds]:
        way.timed(texts[:4])
    slices = [texts[start : start + size] for start in range(0, len(texts), size)]
    for texts_of_turn in slices:
        for way in [*ways, *bounds]:
            way.run(texts_of_turn)
    process.kill()
    tokens = sum(map(len, ours[REFERENCE].tokenizer.tokenize(texts)))
    rows = {way.name: measure(way, tokens) for way in ways}
    reference = np.vstack(next(w for w in ways if w.name == REFERENCE).vectors)
    for way in ways:
        rows[way.name]["least_cosine"] = least_cosine(np.vstack(way.vectors), reference)
    operations = 2 * MATRIX_SIZE**3 * MATRIX_PRODUCTS * len(slices)
    per_token = flops_per_token()
    return {
        "tokens": tokens,
        "tokens_per_text": round(tokens / len(texts), 1),
        "matrix_gflops": {w.name: round(operations / w.seconds / 1e9) for w in bounds},
        "bounds": {w.name: measure(w, operations / per_token) for w in bounds},
        "ways": rows,
    }


def serve_usual_ways(connection: Connection, max_tokens: int, folder: str, paper: bool) -> None:
    """Load the ways that are not ours, send their names, then encode by them as asked."""
    ways = {"paper's loop, float32": paper_loop(max_tokens)} if paper else {}
    for dtype in ("float32", "bfloat16"):
        for batch in (16, 64):
            name = f"sentence-transformers, {dtype}, batch {batch}"
            ways[name] = peer(max_tokens, dtype, batch, f"{folder}/{max_tokens}-{dtype}")
    connection.send(list(ways))
    while True:
        name, texts = connection.recv()
        connection.send(on_the_clock(ways[name], texts))


def ask(connection: Connection, name: str) -> Callable[[list[str]], Timed]:
    """One of the usual ways, in the process at the other end."""

    def timed(texts: list[str]) -> Timed:
        connection.send((name, texts))
        found: Timed = connection.recv()
        return found

    return timed


def measure(way: Way, tokens: float) -> dict[str, float]:
    return {
        "tokens_per_second": round(tokens / way.seconds, 1),
        "tokens_per_cpu_second": round(tokens / way.cpu_seconds, 1),
    }


def paper_loop(max_tokens: int) -> Encode:
    """The method's published evaluation loop: LM head, all hidden states, batches as they come."""
    folder = fetch_model(PACKAGED_MODEL).folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    template = PromptTemplate.parse(PROMPT)

    @torch.no_grad()
    def encode(texts: list[str]) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), 32):
            wrapped = []
            for text in texts[start : start + 32]:
                cut = tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
                wrapped.append(template.wrap(tokenizer.decode(cut, skip_special_tokens=True)))
            batch = tokenizer(wrapped, return_tensors="pt", padding=True)
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
            last = batch["attention_mask"].sum(dim=1) - 1
            vectors.append(states[torch.arange(len(last)), last].numpy())
        return np.vstack(vectors)

    return encode


def peer(max_tokens: int, dtype: str, batch: int, folder: str) -> Encode:
    """sentence-transformers on our own export: same model, prompt, cut and pooling."""
    if not Path(folder).exists():
        config = EncoderConfig(prompt=PROMPT, max_tokens=max_tokens, dtype=dtype)  # type: ignore[arg-type]
        export_sentence_transformer(describe_encoder(config), Path(folder))
    model = sentence_transformers.SentenceTransformer(
        folder, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)}
    )
    return lambda texts: (
        model.encode(texts, batch_size=batch, convert_to_tensor=True).float().numpy()
    )


def multiply(dtype: str) -> Encode:
    """Products of two square matrices, of which nothing but the time is of interest."""
    left = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=getattr(torch, dtype))
    product = torch._int_mm if dtype == "int8" else torch.matmul

    def run(_: list[str]) -> np.ndarray:
        for _turn in range(MATRIX_PRODUCTS):
            result = product(left, left)
        return result[:1, :1].float().numpy()

    return run


def flops_per_token() -> float:
    """Two for each weight that a token is multiplied with."""
    folder = fetch_model(PACKAGED_MODEL).folder
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    return 2.0 * sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)


def least_cosine(found: np.ndarray, reference: np.ndarray) -> float:
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
    return round(float(((found * reference).sum(axis=1) / norms).min()), 5)


def show(title: str, content: dict[str, Any]) -> None:
    """Print a table; a share is of the same precision's bound, of CPU time: least distorted."""
    table = Table(title=f"{title}: {content['tokens_per_text']} tokens a text, prompt included")
    for column in ("way", "tokens/s", "a CPU second", "of the bound", "least cosine"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    bounds = content["bounds"]
    for name, row in content["ways"].items():
        bound = next(bounds[dtype] for dtype in bounds if dtype in name)
        table.add_row(
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_cpu_second']:,.0f}",
            f"{row['tokens_per_cpu_second'] / bound['tokens_per_cpu_second']:.0%}",
            f"{row['least_cosine']:.5f}",
        )
    for dtype, bound in bounds.items():
        name = f"bound, {dtype}: {content['matrix_gflops'][dtype]} GFLOP/s"
        rates = (bound["tokens_per_second"], bound["tokens_per_cpu_second"])
        table.add_row(name, *(f"{rate:,.0f}" for rate in rates), "100%", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
