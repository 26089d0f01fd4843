#!/usr/bin/env bash
# ir-measures 0.4.3: of one and the same run, RR and RR@10 put documents of equal score in opposite
# orders. RR comes from pytrec_eval (later names first), RR with a cutoff from the code of MS MARCO's
# leaderboard (earlier names first), and both may stand in one call. So RR@2 can be greater than RR,
# of which it is a part, and RR@1 can be 1 where P@1 and nDCG@1 are 0. Scores of int8 or binary vectors
# and of cut-off decimals are often equal.
#
# Guess that failed: the package makes one order of a run before it hands it to whoever computes
# Seen, a of a, b, c relevant, all three of score 1: RR 1/3, RR@10 1, RR@1 1, P@1 0, nDCG@1 0;
#   c relevant: RR 1, RR@10 1/3, P@1 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    ir-measures==0.4.3 pytrec-eval-terrier==0.5.11 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import ir_measures
from ir_measures import RR, P, nDCG

run = {"query": {"a": 1.0, "b": 1.0, "c": 1.0}}
measures = [RR, RR @ 10, RR @ 1, P @ 1, nDCG @ 1]


def scores(relevant):
    values = ir_measures.calc_aggregate(measures, {"query": {relevant: 1}}, run)
    return {str(measure): round(values[measure], 3) for measure in measures}


seen = {relevant: scores(relevant) for relevant in ("a", "c")}
print(version("ir-measures"), seen)
wanted = {
    "a": {"RR": 0.333, "RR@10": 1.0, "RR@1": 1.0, "P@1": 0.0, "nDCG@1": 0.0},
    "c": {"RR": 1.0, "RR@10": 0.333, "RR@1": 0.0, "P@1": 1.0, "nDCG@1": 1.0},
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
