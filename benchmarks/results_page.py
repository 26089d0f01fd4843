"""Put results into the tables of ``docs/results.md``: ``python benchmarks/results_page.py``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and is written anew from the
JSON in ``benchmarks/results/``. With ``--check`` nothing is written, and the exit code says whether
the page is what the results give.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation.leaderboard import TaskScore, paired_bootstrap

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
CORPORA = {"20newsgroups": "20 Newsgroups", "reuters-r8": "Reuters R8"}
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def aggregation() -> str:
    """Prompt × pooling, untuned and tuned, with the baselines."""
    found = read("encoder_choice")
    rows = []
    for name, scores in found["baselines"].items():
        cells = [shown(scores[corpus]) for corpus in CORPORA]
        rows.append([name, "", cells[0], "", cells[1], ""])
    prompts = found["untuned"][next(iter(CORPORA))]
    for prompt, poolings in prompts.items():
        for pooling in poolings:
            cells = []
            for corpus in CORPORA:
                for state in ("untuned", "tuned"):
                    place = found.get(state, {}).get(corpus, {}).get(prompt, {}).get(pooling)
                    cells.append("" if place is None else shown(place))
            rows.append([f"`{prompt}`", f"`{pooling}`", *cells])
    head = ["prompt", "pooling"]
    for title in CORPORA.values():
        head += [f"{title}, untuned", "tuned"]
    return table(head, rows)


def gains() -> str:
    """What prompt, pooling and tuning each change, with paired intervals over draws."""
    found = read("encoder_choice")
    steps = [
        ("the prompt, last token: `cluster` over none", ("untuned", "cluster", "last"),
         ("untuned", "none", "last")),
        ("the prompt, last token: `one-word` over none", ("untuned", "one-word", "last"),
         ("untuned", "none", "last")),
        ("the prompt, mean: `cluster` over none", ("untuned", "cluster", "mean"),
         ("untuned", "none", "mean")),
        ("mean over last token, no prompt", ("untuned", "none", "mean"),
         ("untuned", "none", "last")),
        ("mean over last token, `cluster`", ("untuned", "cluster", "mean"),
         ("untuned", "cluster", "last")),
        ("both over mean, `cluster`", ("untuned", "cluster", "last+mean"),
         ("untuned", "cluster", "mean")),
        ("tuning, `one-word`, last token", ("tuned", "one-word", "last"),
         ("untuned", "one-word", "last")),
        ("tuning, `cluster`, last token", ("tuned", "cluster", "last"),
         ("untuned", "cluster", "last")),
        ("tuning, `cluster`, mean", ("tuned", "cluster", "mean"),
         ("untuned", "cluster", "mean")),
    ]  # fmt: skip
    rows = []
    for title, first, second in steps:
        if not (found.get(first[0]) and found.get(second[0])):
            continue
        cells = []
        for corpus in CORPORA:
            one, other = (
                task_score(found[state][corpus][prompt][pooling])
                for state, prompt, pooling in (first, second)
            )
            gain = paired_bootstrap([one], [other])
            cells.append(f"{gain['difference']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})")
        rows.append([title, *cells])
    return table(["what changes", *CORPORA.values()], rows)


def adapters() -> str:
    """The tuned adapters of the fine-tuning recipe beside their peer."""
    found = read("adapter_quality")
    rows = [
        [name, "", *(f"{scores[corpus]:.3f}" for corpus in CORPORA), ""]
        for name, scores in found["baselines"].items()
    ]
    for name, run in found["runs"].items():
        cells = [f"{run['v_measure'][corpus]:.3f}" for corpus in CORPORA]
        seed = name.removeprefix("recipe ")
        rows.append(
            [f"tuned, seed {seed}", str(run["best_step"]), *cells, str(run.get("cpu_minutes", ""))]
        )
    summary = [found["summary"][corpus] for corpus in CORPORA]
    if found["summary"]["seeds"] > 1:
        cells = [mean_and_deviation(one) for one in summary]
        rows.append([f"mean of {found['summary']['seeds']} seeds ± deviation", "", *cells, ""])
    leads = [f"{one['lead_over_minilm']:+.3f}" for one in summary]
    rows.append(["mean over all-MiniLM-L6-v2", "", *leads, ""])
    for earlier in found["earlier"]:
        recipe, scores = earlier["recipe"], earlier["summary"]
        fewest, most = recipe["crop_words"]
        name = f"before: rank {recipe['lora_rank']}, crops of {fewest} to {most} words"
        name += f", {scores['seeds']} seeds"
        cells = [mean_and_deviation(scores[corpus]) for corpus in CORPORA]
        rows.append([name, "", *cells, ""])
    return table(["encoder", "best step", *CORPORA.values(), "CPU minutes"], rows)


def mean_and_deviation(scores: dict[str, Any]) -> str:
    """A summary's mean, and its deviation where more than one seed made it."""
    deviation = scores["standard_deviation"]
    return f"{scores['mean']:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


ON_OWN_TEXT = "tuned-on-"
"""How adapters are named that went on from the packaged one on a corpus's own text."""


def reach() -> str:
    """Encoders on corpora that the packaged adapter has read nothing of, with their means."""
    found = read("adapter_quality")["reach"]
    names = list(next(iter(found.values()))["v_measure"])
    titles = {
        "none": "packaged model, no adapter",
        "packaged": "packaged model, its adapter",
        "all-mpnet-base-v2:none": "all-mpnet-base-v2, the adapter's teacher",
    }
    rows = []
    for name, run in found.items():
        if name.startswith(ON_OWN_TEXT):
            continue
        scores = [run["v_measure"][corpus] for corpus in names]
        cells = [f"{score:.3f}" for score in [*scores, sum(scores) / len(scores)]]
        model, _, adapter = name.rpartition(":")
        tuned = "tuned by its recipe without the teacher"
        of_other = f"{model}, {'no adapter' if adapter == 'none' else tuned}"
        rows.append([titles.get(name, of_other if model else name), *cells])
    return table(["encoder", *names, "mean"], rows)


def own_text() -> str:
    """Adapters that went on from the packaged one with a teacher, on one corpus's own text."""
    found = read("adapter_quality")["reach"]
    rows = []
    for name, run in found.items():
        if name in ("all-MiniLM-L6-v2", "packaged") or name.startswith(ON_OWN_TEXT):
            title = name.replace(ON_OWN_TEXT, "tuned on ").replace("packaged", "packaged adapter")
            rows.append([title, *(f"{score:.3f}" for score in run["v_measure"].values())])
    return table(["encoder", *found["packaged"]["v_measure"]], rows)


def adapter_variants() -> str:
    """What each change of the recipe does to documents that no pair is made of."""
    found = read("adapter_quality")
    scored = {**found["development_baselines"]}
    for name, run in found["development"].items():
        title = f"the recipe, {found['recipe']['max_steps']} steps" if name == "recipe" else name
        scored[title] = run["v_measure"]
    rows = [
        [name, *(f"{scores[corpus]:.3f}" for corpus in CORPORA)] for name, scores in scored.items()
    ]
    return table(["recipe, seed 0", *CORPORA.values()], rows)


def selection() -> str:
    """What is chosen without labels, beside the defaults and the best there is."""
    found = read("encoder_choice")["selection"]
    rows = []
    names = {
        "chosen": "chosen without labels",
        "paper_default": "the paper's default",
        "our_default": "our default",
        "best_by_labels": "best of all candidates, by labels",
    }
    for key, title in names.items():
        cells = []
        for corpus in CORPORA:
            prompt, layer, pooling = found[corpus][key]["candidate"]
            cells += [f"`{prompt}`, `{pooling}`, layer {layer}", shown(found[corpus][key])]
        rows.append([title, *cells])
    head = [""]
    for title in CORPORA.values():
        head += [title, "V-measure"]
    return table(head, rows)


def selection_ranks() -> str:
    """How the label-free ranking agrees with the one by V-measure."""
    found = read("encoder_choice")["selection"]
    lines = {
        "candidates": "candidates",
        "documents": "documents",
        "spearman": "Spearman of score and V-measure",
        "spearman_half_agreement": "of half agreement alone",
        "spearman_partner_rank": "of partner rank alone",
        "gain_over_paper_default": "chosen over the paper's default",
        "probability_best": "chosen one first in resamples",
        "as_good": "candidates within two standard errors",
    }
    rows = []
    for key, title in lines.items():
        cells = [found[corpus][key] for corpus in CORPORA]
        signed = key == "gain_over_paper_default"
        rows.append([title, *(f"{cell:+.3f}" if signed else str(cell) for cell in cells)])
    return table(["", *CORPORA.values()], rows)


def selection_cost() -> str:
    """Seconds of choosing against embedding once per candidate."""
    found = read("selection_cost")
    rows = [
        ["candidates", str(found["candidates"])],
        ["choosing, seconds", f"{found['seconds_selection']:.1f}"],
        [
            "embedding once per candidate, seconds",
            f"{found['seconds_embedding_once_per_candidate']:.1f}",
        ],
        ["times cheaper", f"{found['times_cheaper']:.1f}"],
    ]
    return table([f"{found['documents']} documents of {found['cut_tokens']} tokens", ""], rows)


def attention() -> str:
    """Shares of attention before and after tuning, and their shift."""
    found = read("attention_shift")
    rows = []
    for corpus, title in CORPORA.items():
        for prompt, entry in found[corpus].items():
            before, after = entry["shares"]["untuned"], entry["shares"]["tuned"]
            change = entry["shift"]["tuned"]
            cells = []
            for name in ("prompt", "content", "first token"):
                moved = change[name]
                cells.append(
                    f"{before[name]['mean']:.1%} → {after[name]['mean']:.1%} "
                    f"({100 * moved['mean']:+.1f} ± {100 * moved['standard_error']:.1f})"
                )
            rows.append([f"{title}, `{prompt}`", *cells])
    return table(["", "prompt", "content words", "first token"], rows)


TABLES = {
    "aggregation": aggregation,
    "gains": gains,
    "adapters": adapters,
    "adapter-variants": adapter_variants,
    "reach": reach,
    "own-text": own_text,
    "selection": selection,
    "selection-ranks": selection_ranks,
    "selection-cost": selection_cost,
    "attention": attention,
}


def task_score(found: dict[str, Any]) -> TaskScore:
    return TaskScore("task", "v_measure", found["v_measure"], tuple(found["draws"]))


def shown(found: dict[str, Any]) -> str:
    return f"{found['v_measure']:.3f}"


def render(page: str) -> str:
    """The page with every table written anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match.group(1)}{TABLES[match.group(2)]()}{match.group(3)}"

    return _TABLE.sub(fill, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    if arguments.check:
        sys.exit(render(page) != page)
    PAGE.write_text(render(page))


if __name__ == "__main__":
    main()
