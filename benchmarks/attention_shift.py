"""What tuning does to attention: ``python benchmarks/attention_shift.py --adapter FOLDER``.

Attention of the last token in the last layer of the packaged model, heads averaged, over prompt and
text of test documents of both packaged corpora cut to 64 tokens, for two prompts, before and after
tuning. Writes the shares and their paired shift, and the picture of the first corpus and prompt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.encoder.sources import fetch_adapter
from pipelines.evaluation.attention import inspect_attention
from pipelines.evaluation.config import AttentionConfig
from pipelines.runtime.command import configure_logging, connect_ray
from pipelines.runtime.packaged import CorpusName, load_labelled_corpus
from pipelines.runtime.run_record import RunRecord

CORPORA: tuple[CorpusName, ...] = ("20newsgroups", "reuters-r8")
PROMPTS = ("one-word", "cluster")
DOCUMENTS = 80
CUT_TOKENS = 64
RESULTS = Path(__file__).parent / "results" / "attention_shift.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "attention"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True)
    arguments = parser.parse_args()
    configure_logging()
    connect_ray()
    results: dict[str, object] = {
        "command": "python benchmarks/attention_shift.py --adapter FOLDER",
        "documents": DOCUMENTS,
        "cut_tokens": CUT_TOKENS,
        "adapter": fetch_adapter(arguments.adapter).revision,
    }
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "tuned"
        link.symlink_to(Path(arguments.adapter).absolute())
        for corpus in CORPORA:
            path = Path(folder) / f"{corpus}.parquet"
            pq.write_table(load_labelled_corpus(corpus, "test"), path)
            shares = {}
            for prompt in PROMPTS:
                output = Path(folder) / f"{corpus}-{prompt}"
                config = AttentionConfig(
                    corpus=str(path),
                    output=str(output),
                    adapters=(str(link),),
                    prompt=prompt,
                    documents=DOCUMENTS,
                    max_tokens=CUT_TOKENS,
                )
                with RunRecord(config.output, "inspect_attention", asdict(config)) as record:
                    inspect_attention(config, record)
                shares[prompt] = json.loads((output / "shares.json").read_text())
                if (corpus, prompt) == (CORPORA[0], PROMPTS[0]):
                    for suffix in (".png", ".svg"):
                        picture = (output / f"attention{suffix}").read_bytes()
                        PICTURE.with_suffix(suffix).write_bytes(picture)
                for encoder, found in shares[prompt]["shares"].items():
                    shown = {name: round(value["mean"], 3) for name, value in found.items()}
                    print(corpus, prompt, encoder, json.dumps(shown), flush=True)
            results[corpus] = shares
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
