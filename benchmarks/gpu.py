"""The encoder on one GPU: exactness, speed, a tuning step, assignment to centroids.

    python benchmarks/gpu.py

Any machine with one GPU will do, in at most ten minutes: it needs torch, transformers,
sentence-transformers, safetensors, NumPy, pyarrow and this checkout, no Ray and no network; the
tuning step also PEFT, scikit-learn and zstandard. Models have random weights in the shapes of
well-known ones and are made in place. Where Ray and all else that the jobs need is installed, one
embedding job runs too, its actor on the GPU. What a section measured is written to
``benchmarks/results/gpu.json`` at once, so a run that is cut off keeps it; a section for which the
time is over, or a package is missing, says so there.

``--device cpu --models tiny`` runs every line on tiny shapes, to try the script itself.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch
import transformers
from shapes import SHAPES  # type: ignore[import-not-found]
from torch.nn.attention import varlen

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.elementwise import PLAIN
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.packed import PackedDecoder

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "gpu.json"
POOLINGS = ("last", "mean", "max", "last+mean")
LENGTHS = (1, 2, 3, 17, 31, 64, 255, 256, 1000, 4096)
SPEED_LENGTHS = (32, 256, 1024)
WORDS = 512
"""Words of the made tokenizer, each one token."""
# Dense bfloat16 peaks that the makers state, FLOP/s; elsewhere a measured product is the bound.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class Plan:
    """What a run is given."""

    device: torch.device
    models: tuple[str, ...]
    deadline: float
    """``time.monotonic()`` after which no section is begun."""
    small: bool
    """Tiny amounts of work, to try the script."""

    def seconds_left(self) -> float:
        """Seconds until the deadline, below 0 after it."""
        return self.deadline - time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=[*SHAPES][:3])
    parser.add_argument("--seconds", type=float, default=540.0, help="no section begins after")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    accept_older_torch()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU here; --device cpu --models tiny tries the script")
    deadline = time.monotonic() + arguments.seconds
    small = arguments.models == ["tiny"]
    plan = Plan(device, tuple(arguments.models), deadline, small)
    results: dict[str, Any] = {"machine": describe_machine(device)}
    with tempfile.TemporaryDirectory() as folder:
        for name in plan.models:
            model = make_model(Path(folder) / name, name)
            for section in (
                check_exactness,
                measure_speed,
                measure_budgets,
                measure_tuning,
                measure_job,
            ):
                record(
                    results, arguments.output, f"{section.__name__} {name}", section, plan, model
                )
            release(device)
        record(results, arguments.output, "measure_assignment", measure_assignment, plan)


def accept_older_torch() -> None:
    """Let torch's kernel be called as by torch 2.13 where an older one groups queries unasked."""
    kernel = varlen.varlen_attn
    if "enable_gqa" not in inspect.signature(kernel).parameters:
        varlen.varlen_attn = lambda *tensors, enable_gqa, **given: kernel(*tensors, **given)


def record(
    results: dict[str, Any], output: Path, name: str, section: Callable[..., Any], *given: Any
) -> None:
    """Run a section if there is time, and write what is known by now."""
    plan: Plan = given[0]
    started = time.monotonic()
    if plan.seconds_left() <= 0:
        results[name] = {"skipped": "the time was over"}
    else:
        try:
            results[name] = section(*given)
        except Exception:  # noqa: BLE001  # the sections after it are worth their time
            results[name] = {"failed": traceback.format_exc().splitlines()[-30:]}
        results[name]["seconds"] = round(time.monotonic() - started, 1)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    print(name, json.dumps(results[name], indent=2), flush=True)
    release(plan.device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device, its stated and its measured rate of bfloat16 products."""
    size = 8192 if device.type == "cuda" else 512
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    rate = 2 * size**3 / seconds_of(lambda: left @ left, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    stated = next((peak for part, peak in PEAKS.items() if part in name), None)
    return {
        "device": name,
        "torch": torch.__version__,
        "stated_tflops": stated and stated / 1e12,
        "measured_tflops": float(f"{rate / 1e12:.3g}"),
    }


def peak_flops(device: torch.device) -> float:
    """What utilisation is measured against: the stated peak, else the measured one."""
    machine = describe_machine(device)
    return (machine["stated_tflops"] or machine["measured_tflops"]) * 1e12


def seconds_of(work: Callable[[], Any], device: torch.device, least: float = 0.5) -> float:
    """Seconds of one call, averaged over calls of ``least`` seconds in all, after another."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    started, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - started < least:
        work()
        wait()
        calls += 1
    return (time.perf_counter() - started) / calls


def make_model(folder: Path, name: str) -> Path:
    """Random bfloat16 weights of a shape, with a tokenizer of :data:`WORDS` words."""
    kind, shape = SHAPES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(
        **shape, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(WORDS))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def texts_of(lengths: Sequence[int], seed: int = 0) -> list[str]:
    """A text of random words for each length in tokens."""
    random = np.random.default_rng(seed)
    return [" ".join(f"w{n}" for n in random.integers(0, WORDS, length)) for length in lengths]


def load(plan: Plan, model: Path, **settings: Any) -> Encoder:
    """The encoder as the product loads it."""
    config = EncoderConfig(model=str(model), prompt="none", **{"max_tokens": 4096, **settings})
    return Encoder.load(config, device=str(plan.device))


def is_packed(encoder: Encoder) -> bool:
    return isinstance(encoder._decoder, PackedDecoder)


def check_exactness(plan: Plan, model: Path) -> dict[str, Any]:
    """Least cosine of every pooling in every precision to one text at a time in float32."""
    lengths = LENGTHS[:6] if plan.small else LENGTHS
    texts = texts_of(lengths)
    reference = naive_states(plan, model, texts)
    rows: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        for pooling in POOLINGS:
            try:
                encoder = load(plan, model, dtype=dtype, pooling=pooling)
            except ValueError as error:  # such as float16 of a model whose states overflow
                rows[f"{dtype} {pooling}"] = {"refused": str(error)}
                continue
            expected = np.stack([naive_pool(states, pooling) for states in reference])
            cosines = (encoder.encode(texts) * expected).sum(axis=1)
            rows[f"{dtype} {pooling}"] = {
                "least_cosine": round(float(cosines.min()), 6),
                "packed": is_packed(encoder),
            }
    return {"lengths": list(lengths), "ways": rows, "halved": provoke_halving(plan, model)}


@torch.inference_mode()
def naive_states(plan: Plan, model: Path, texts: Sequence[str]) -> list[np.ndarray]:
    """Last layer's states float32 (tokens, d) of each text alone, by the model's own pass."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    plain = transformers.AutoModel.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    plain = plain.eval().to(plan.device)
    inputs = (tokenizer(text, return_tensors="pt").to(plan.device) for text in texts)
    return [plain(input_ids=i["input_ids"]).last_hidden_state[0].cpu().numpy() for i in inputs]


def naive_pool(states: np.ndarray, pooling: str) -> np.ndarray:
    """One text's vector of length 1, by the definition of a pooling."""
    parts = {"last": states[-1], "mean": states.mean(axis=0), "max": states.max(axis=0)}
    joined = np.concatenate([parts[name] for name in pooling.split("+")])
    return joined / np.linalg.norm(joined)


def provoke_halving(plan: Plan, model: Path) -> dict[str, Any]:
    """Vectors of batches that do not fit, and of batches that do, where a batch can be too big."""
    if plan.device.type != "cuda":
        return {"skipped": "only a GPU runs out of memory so"}
    encoder = load(plan, model, dtype="bfloat16")
    texts = texts_of([512] * 256)
    expected = encoder.encode(texts)
    total = torch.cuda.get_device_properties(plan.device).total_memory
    room = torch.cuda.memory_allocated(plan.device) + (1 << 30)
    release(plan.device)
    torch.cuda.set_per_process_memory_fraction(room / total, plan.device)
    try:
        encoder.budget_tokens = given = len(texts) * 512
        vectors = encoder.encode(texts)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, plan.device)
    cosine = float((vectors * expected).sum(axis=1).min())
    return {"from": given, "to": encoder.budget_tokens, "least_cosine": round(cosine, 6)}


def measure_speed(plan: Plan, model: Path) -> dict[str, Any]:
    """Tokens a second at several lengths, beside sentence-transformers at its best batch."""
    started = time.perf_counter()
    encoder = load(plan, model, dtype="bfloat16")
    first = time.perf_counter() - started
    ways = {"ours": encoder.encode}
    unfused = load(plan, model, dtype="bfloat16")
    if isinstance(unfused._decoder, PackedDecoder):
        unfused._decoder._elementwise = PLAIN
        ways["ours, not compiled"] = unfused.encode
    peers = sentence_transformers_ways(plan, model)
    peak = peak_flops(plan.device)
    tokens = 2_048 if plan.small else 262_144
    rows: dict[str, Any] = {}
    for length in SPEED_LENGTHS[:1] if plan.small else SPEED_LENGTHS:
        texts = texts_of([length] * (tokens // length))
        cost = flops_per_token(model, length)
        rates = {name: rate_of(plan, encode, texts, tokens) for name, encode in ways.items()}
        ids = [np.array(some, np.int32) for some in encoder.tokenizer.tokenize(texts)]
        rates["ours, tokenized before"] = rate_of(plan, encoder.encode_tokens, ids, tokens)
        for name in fastest(plan, peers, texts):
            rates[name] = rate_of(plan, peers[name], texts, tokens)
        rates |= graph_rate(plan, model, length)
        rows[str(length)] = {
            name: {
                "tokens_per_second": round(rate),
                "utilisation": round(rate * cost / peak, 4),
            }
            for name, rate in rates.items()
        }
    return {
        "packed": is_packed(encoder),
        "seconds_to_load": round(first, 1),
        "peak_tflops": peak / 1e12,
        "by_length": rows,
    }


def fastest(plan: Plan, ways: dict[str, Callable[[list[str]], Any]], texts: list[str]) -> list[str]:
    """The name of the fastest way by one call each; none of none."""
    once = {
        name: seconds_of(lambda encode=way: encode(texts), plan.device, 0.0)  # type: ignore[misc]
        for name, way in ways.items()
    }
    return sorted(once, key=lambda name: once[name])[:1]


def rate_of(plan: Plan, encode: Callable[[list[Any]], Any], texts: list[Any], tokens: int) -> float:
    """Tokens a second: of texts tokenizing included, as a user meets it."""
    return tokens / seconds_of(lambda: encode(texts), plan.device, 0.1 if plan.small else 1.5)


def sentence_transformers_ways(plan: Plan, model: Path) -> dict[str, Callable[[list[str]], Any]]:
    """The same model under sentence-transformers, at several batch sizes."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return {}
    import sentence_transformers

    from pipelines.encoder.sentence_transformers import export_sentence_transformer

    folder = model.with_name(f"{model.name}-peer")
    if not folder.exists():
        config = EncoderConfig(model=str(model), prompt="none", dtype="bfloat16", max_tokens=4096)
        export_sentence_transformer(describe_encoder(config), folder)
    peer = sentence_transformers.SentenceTransformer(
        str(folder), device=str(plan.device), model_kwargs={"dtype": torch.bfloat16}
    )

    def way(batch: int) -> Callable[[list[str]], Any]:
        return lambda texts: peer.encode(texts, batch_size=batch, convert_to_tensor=True)

    sizes = (8,) if plan.small else (32, 128, 512)
    return {f"sentence-transformers, batch {size}": way(size) for size in sizes}


def graph_rate(plan: Plan, model: Path, length: int) -> dict[str, float]:
    """The model's own pass on one fixed shape, captured as a CUDA graph: what launches cost."""
    if plan.device.type != "cuda":
        return {}
    plain = transformers.AutoModel.from_pretrained(model, dtype=torch.bfloat16).eval()
    plain = plain.to(plan.device)
    ids = torch.randint(4, WORDS, (max(1, 8192 // length), length), device=plan.device)
    with torch.inference_mode():
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                plain(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            plain(input_ids=ids, use_cache=False)
        seconds = seconds_of(graph.replay, plan.device)
    return {"model's own pass as a CUDA graph, no tokenizing": ids.numel() / seconds}


def measure_budgets(plan: Plan, model: Path) -> dict[str, Any]:
    """Tokens a second by tokens of a batch, and the kernels that take most of the time."""
    encoder = load(plan, model, dtype="bfloat16")
    tokens, length = (2_048, 32) if plan.small else (262_144, 256)
    ids = [
        np.array(some, np.int32)
        for some in encoder.tokenizer.tokenize(texts_of([length] * (tokens // length)))
    ]
    rates = {}
    for budget in (8_192, 32_768, 131_072):
        encoder.budget_tokens = budget
        rates[str(budget)] = round(rate_of(plan, encoder.encode_tokens, ids, tokens))
    kinds = torch.profiler.ProfilerActivity
    kind = kinds.CUDA if plan.device.type == "cuda" else kinds.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        encoder.encode_tokens(ids)
    kernels = [
        (event.key, event.self_device_time_total or event.self_cpu_time_total, event.count)
        for event in profile.key_averages()
    ]
    kernels.sort(key=lambda row: -row[1])
    return {
        "tokens_per_second_by_budget": rates,
        "microseconds": round(sum(row[1] for row in kernels)),
        "kernels": [
            f"{round(time)} us in {count}: {key[:100]}" for key, time, count in kernels[:15]
        ],
    }


def measure_job(plan: Plan, model: Path) -> dict[str, Any]:
    """An embedding job as users start it, and its rate beside the bare encoder's."""
    needed = ("ray", "orjson", "tyro", "pydantic", "zstandard")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}"}
    documents, length = (200, 32) if plan.small else (20_000, 256)
    folder = model.with_name(f"{model.name}-job")
    folder.mkdir()
    lengths = np.random.default_rng(0).integers(length // 2, length * 3 // 2, documents)
    texts = texts_of(lengths.tolist())
    ids = [str(number) for number in range(documents)]
    pq.write_table(pa.table({"id": ids, "text": texts}), folder / "corpus.parquet")
    flags = {"corpus": folder / "corpus.parquet", "model": model, "output": folder / "vectors"}
    settings = [f"--{name}={value}" for name, value in flags.items()]
    settings += ["--prompt=none", "--dtype=bfloat16", "--max-tokens=512", "--num-actors=1"]
    started = time.monotonic()
    subprocess.run(
        [sys.executable, ROOT / "jobs" / "embed_corpus.py", *settings],
        check=True,
        timeout=max(60.0, plan.seconds_left()),
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    record = json.loads((folder / "vectors" / "run.json").read_text())
    encoder = load(plan, model, dtype="bfloat16", max_tokens=512)
    bare = rate_of(
        plan, encoder.encode_tokens, encoder.tokenizer.tokenize(texts), int(lengths.sum())
    )
    return {
        "documents": documents,
        "tokens": int(lengths.sum()),
        "seconds_in_all": round(time.monotonic() - started, 1),
        "job": record["metrics"],
        "bare_tokens_per_second": round(bare),
    }


def flops_per_token(model: Path, length: int) -> float:
    """Two for each weight that a token is multiplied with, and attention to half its text."""
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        layers = transformers.AutoModel.from_config(config).layers
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2.0 * weights + 4.0 * heads * length / 2


def measure_tuning(plan: Plan, model: Path) -> dict[str, Any]:
    """A contrastive step of ours beside a plain one of PEFT on the same pairs, and its memory."""
    needed = ("peft", "sklearn", "zstandard")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}"}
    pairs, length = (4, 16) if plan.small else (64, 64)
    anchors, positives = texts_of([length] * pairs, 1), texts_of([length] * pairs, 2)
    tokens = 2 * pairs * length
    rows = {}
    for name, make in (("ours", our_step), ("plain PEFT", plain_step)):
        release(plan.device)
        if plan.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(plan.device)
        step = make(plan, model, anchors, positives)
        seconds = seconds_of(step, plan.device, 0.1 if plan.small else 2.0)
        rows[name] = {"tokens_per_second": round(tokens / seconds)}
        if plan.device.type == "cuda":
            rows[name]["peak_mib"] = torch.cuda.max_memory_allocated(plan.device) >> 20
        del step
    return {"pairs": pairs, "tokens_a_text": length, "ways": rows}


def our_step(
    plan: Plan, model: Path, anchors: list[str], positives: list[str]
) -> Callable[[], Any]:
    from pipelines.training.config import FinetuneConfig
    from pipelines.training.trainer import AdapterTrainer

    config = FinetuneConfig(
        model=str(model), prompt="none", dtype="bfloat16", batch_pairs=len(anchors)
    )
    trainer = AdapterTrainer(config.trainer, describe_encoder(config.encoder), plan.device)
    ids = [str(n) for n in range(len(anchors))]
    table = pa.table({"anchor": anchors, "positive": positives, "id": ids})
    numbers: Iterator[int] = iter(range(1, 1 << 30))
    return lambda: trainer.step(next(numbers), table, 0)


def plain_step(
    plan: Plan, model: Path, anchors: list[str], positives: list[str]
) -> Callable[[], Any]:
    import peft

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    base = transformers.AutoModel.from_pretrained(model, dtype=torch.bfloat16).to(plan.device)
    tuned = peft.get_peft_model(
        base, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad])
    inputs = [
        tokenizer(texts, return_tensors="pt", padding=True).to(plan.device)
        for texts in (anchors, positives)
    ]
    target = torch.arange(len(anchors), device=plan.device)

    def step() -> None:
        first, second = (
            torch.nn.functional.normalize(
                tuned(input_ids=i["input_ids"]).last_hidden_state[:, -1].float(), dim=-1
            )
            for i in inputs
        )
        scores = first @ second.T / 0.05
        loss = torch.nn.functional.cross_entropy(scores, target)
        loss = loss + torch.nn.functional.cross_entropy(scores.T, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_assignment(plan: Plan) -> dict[str, Any]:
    """Vectors a second to their nearest of k centroids, by products of torch on the device."""
    rows, dimension, k = (4_096, 64, 16) if plan.small else (10_000_000, 1_024, 10_000)
    block = min(rows, 1 << 16)
    vectors = torch.nn.functional.normalize(torch.randn(block, dimension, device=plan.device))
    centroids = torch.nn.functional.normalize(torch.randn(k, dimension, device=plan.device))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = vectors.to(dtype), centroids.to(dtype).T.contiguous()
        seconds = seconds_of(lambda a=left, b=right: (a @ b).max(dim=1), plan.device)  # type: ignore[misc]
        found[str(dtype).removeprefix("torch.")] = {
            "vectors_per_second": round(block / seconds),
            f"seconds_for_{rows}": round(rows * seconds / block, 2),
        }
    return {"dimension": dimension, "clusters": k, "block": block, "ways": found}


if __name__ == "__main__":
    main()
