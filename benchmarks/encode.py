"""How fast texts become vectors, beside the usual ways and the machine's own bound.

    python benchmarks/encode.py
    python benchmarks/encode.py --openvino-python PATH  # with OpenVINO, under that interpreter
    python benchmarks/encode.py --shape Qwen3-0.6B      # random weights

Takes the packaged model and 20 Newsgroups, the same texts, prompt and threads for every way. The
ways take turns on slices of the texts, so that a machine whose load changes slows all of them
alike. The usual ways run in a process of their own, where nothing of Shoal has changed how memory
is allocated. Prints a table and writes ``benchmarks/results/encode.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, Listener
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
from shapes import SHAPES  # type: ignore[import-not-found]

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.sentence_transformers import export_sentence_transformer
from pipelines.encoder.sources import PACKAGED_MODEL, fetch_model
from pipelines.runtime.packaged import load_labelled_corpus

RESULTS = Path(__file__).parent / "results" / "encode.json"
PROMPT = "one-word"
MATRIX_SIZE, MATRIX_PRODUCTS = 2048, 5
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
    parser.add_argument("--turns", type=int, default=1, help="times that all slices are encoded")
    parser.add_argument("--openvino-python", help="an interpreter with openvino, optimum-intel")
    parser.add_argument(
        "--shape", type=str.lower, choices=SHAPES, help="a model of random weights instead"
    )
    parser.add_argument("--without", nargs="*", default=[], help="words of ways to leave out")
    parser.add_argument("--folder", help="keeps exported models from run to run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the other process too
    torch.set_num_threads(arguments.threads)
    corpus = load_labelled_corpus("20newsgroups", "test")["text"].to_pylist()
    texts = corpus[:: len(corpus) // arguments.texts][: arguments.texts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        model = PACKAGED_MODEL
        if arguments.shape:
            model = make_model(Path(folder, arguments.shape), arguments.shape)
        results: dict[str, Any] = {
            "command": " ".join(["python", *sys.argv]),
            "machine": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
            "threads": arguments.threads,
            "texts": len(texts),
            "turns": arguments.turns,
        }
        for title, max_tokens in (
            ("natural lengths, cut at 256 tokens", 256),
            (f"short, cut at {SHORT_TOKENS} tokens", SHORT_TOKENS),
        ):
            results[title] = compare(texts, max_tokens, folder, model, arguments)
            show(title, results[title])
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def make_model(folder: Path, shape: str) -> str:
    """A model of random weights, in bfloat16, with the packaged model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch_model(PACKAGED_MODEL).folder)
    kind, settings = SHAPES[shape]
    config = getattr(transformers, kind)(**{**settings, "vocab_size": len(tokenizer)})
    with torch.device("cpu"):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def compare(
    texts: list[str], max_tokens: int, folder: str, model: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Encode the same texts every way, in turns; rates in tokens a second."""

    def wanted(name: str) -> bool:
        return not any(word in name for word in arguments.without)

    connection, process = start_usual_ways(max_tokens, folder, model, arguments.without)
    ways = [Way(name, ask(connection, name)) for name in connection.recv()]
    ours = {
        name: Encoder.load(
            EncoderConfig(
                adapter=None,
                model=model,
                prompt=PROMPT,
                max_tokens=max_tokens,
                dtype=dtype,  # type: ignore[arg-type]
            ),
            device="cpu",
            compile_model=compiled,
        )
        for name, (dtype, compiled) in OURS.items()
        if wanted(name)
    }
    ways += [Way(name, partial(on_the_clock, encoder.encode)) for name, encoder in ours.items()]
    peers = contextlib.ExitStack()
    if arguments.openvino_python:
        tokenize = ours[REFERENCE].tokenizer.tokenize
        openvino = peers.enter_context(openvino_process(arguments, folder, model))
        ways += [Way(name, ask(openvino, name, tokenize)) for name in openvino.recv()]
    bounds = [
        Way(name, partial(on_the_clock, multiply(name))) for name in ("float32", "bfloat16", "int8")
    ]
    for way in [*ways, *bounds]:
        way.timed(texts[: arguments.slice])
    slices = [texts[i : i + arguments.slice] for i in range(0, len(texts), arguments.slice)]
    for number, texts_of_turn in enumerate(slices * arguments.turns):
        ordered = [*ways, *bounds]
        for way in ordered if number % 2 else ordered[::-1]:
            way.run(texts_of_turn)
    process.kill()
    peers.close()
    tokens = arguments.turns * sum(map(len, ours[REFERENCE].tokenizer.tokenize(texts)))
    rows: dict[str, dict[str, float]] = {way.name: measure(way, tokens) for way in ways}
    reference = np.vstack(next(w for w in ways if w.name == REFERENCE).vectors)
    for way in ways:
        rows[way.name]["least_cosine"] = least_cosine(np.vstack(way.vectors), reference)
    operations = 2 * MATRIX_SIZE**3 * MATRIX_PRODUCTS * len(slices) * arguments.turns
    per_token = flops_per_token(model)
    return {
        "tokens": tokens,
        "tokens_per_text": round(tokens / len(texts) / arguments.turns, 1),
        "matrix_gflops": {w.name: round(operations / w.seconds / 1e9) for w in bounds},
        "bounds": {w.name: measure(w, operations / per_token) for w in bounds},
        "ways": rows,
    }


def start_usual_ways(
    max_tokens: int, folder: str, model: str, without: list[str]
) -> tuple[Connection, Any]:
    """The other process, and the connection to it."""
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(
        target=serve_usual_ways, args=(theirs, max_tokens, folder, model, without), daemon=True
    )
    process.start()
    theirs.close()  # else a process that ended would be waited for, for ever
    return connection, process


@contextlib.contextmanager
def openvino_process(
    arguments: argparse.Namespace, folder: str, model: str
) -> Iterator[Connection]:
    """A process of another interpreter that encodes with OpenVINO."""
    script = Path(__file__).with_name("openvino_peer.py")
    with Listener(family="AF_UNIX") as listener:
        command = [
            *(arguments.openvino_python, script, listener.address),
            *(fetch_model(model).folder, folder, str(arguments.threads)),
        ]
        # Nothing of what is set for our threads.
        kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "PYTHONPATH")}
        with subprocess.Popen(command, env=kept, stdout=subprocess.DEVNULL) as process:
            with listener.accept() as connection:
                yield connection
            process.wait()


def serve_usual_ways(
    connection: Connection, max_tokens: int, folder: str, model: str, without: list[str]
) -> None:
    """Load the ways that are not ours, send their names, then encode by them as asked."""
    makers: dict[str, Callable[[], Encode]] = {}
    if max_tokens > SHORT_TOKENS:
        makers["paper's loop, float32"] = partial(paper_loop, model, max_tokens)
    for dtype in ("float32", "bfloat16"):
        for batch in (16, 64):
            exported = f"{folder}/{Path(model).name}-{max_tokens}-{dtype}"
            makers[f"sentence-transformers, {dtype}, batch {batch}"] = partial(
                peer, model, max_tokens, dtype, batch, exported
            )
    ways = {
        name: make() for name, make in makers.items() if not any(word in name for word in without)
    }
    connection.send(list(ways))
    while True:
        name, texts = connection.recv()
        connection.send(on_the_clock(ways[name], texts))


def ask(
    connection: Connection, name: str, tokenize: Callable[[list[str]], Any] = list
) -> Callable[[list[str]], Timed]:
    """One of the usual ways, in the process at the other end."""

    def timed(texts: list[str]) -> Timed:
        connection.send((name, tokenize(texts)))
        answer: Timed = connection.recv()
        return answer

    return timed


def measure(way: Way, tokens: float) -> dict[str, float]:
    return {
        "tokens_per_second": round(tokens / way.seconds, 1),
        "tokens_per_cpu_second": round(tokens / way.cpu_seconds, 1),
    }


def paper_loop(name: str, max_tokens: int) -> Encode:
    """The method's published evaluation loop: LM head, all hidden states, batches as they come."""
    folder = fetch_model(name).folder
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


def peer(name: str, max_tokens: int, dtype: str, batch: int, folder: str) -> Encode:
    """sentence-transformers on our own export: same model, prompt, cut and pooling."""
    if not Path(folder).exists():
        config = EncoderConfig(
            adapter=None,
            model=name,
            prompt=PROMPT,
            max_tokens=max_tokens,
            dtype=dtype,  # type: ignore[arg-type]
        )
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


def flops_per_token(name: str) -> float:
    """Two for each weight that a token is multiplied with."""
    folder = fetch_model(name).folder
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
