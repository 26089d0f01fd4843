#!/usr/bin/env bash
# mteb 2.26.24: CachedEmbeddingWrapper(model, folder) files vectors by task, role (query or document) and
# the sample's content. The model is no part of it, nor its revision: a second model that is given the
# same folder, as one folder named "cache" for a comparison would be, is never asked. It gets the first
# one's vectors, and so its scores, where the two have one dimension. A line of the log at level INFO,
# "All items found in cache", is all that is said; the model's metadata is at hand and names another.
#
# Guess that failed: vectors of another model, told apart by its name and revision, are not taken
# Seen, two encoders that give 1 and 2 throughout, one folder: 1, and 1 of the second; its encode was
# never called. With a folder each: 1 and 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mteb==2.26.24 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
import warnings

import mteb
import numpy as np
from datasets import Dataset
from mteb.models import ModelMeta
from mteb.models.cache_wrappers import CachedEmbeddingWrapper
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")
task = mteb.get_task("TwentyNewsgroupsClustering.v2").metadata
texts = Dataset.from_dict({"text": ["the first text", "the second text"]})


class Constant:
    def __init__(self, name, value):
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": name, "revision": name[-1]})
        self.value, self.calls = value, 0

    def encode(self, inputs, **options):
        self.calls += 1
        return np.full((len(inputs.dataset), 4), self.value, dtype=np.float32)


def values(folders):
    models = [Constant("example/one", 1.0), Constant("example/two", 2.0)]
    seen = []
    for model, folder in zip(models, folders):
        cached = CachedEmbeddingWrapper(model, folder)
        vectors = cached.encode(DataLoader(texts), task_metadata=task, hf_split="test", hf_subset="default")
        seen.append((float(vectors.min()), float(vectors.max()), model.calls))
    return seen


folder = sys.argv[1]
shared = values([f"{folder}/cache"] * 2)
apart = values([f"{folder}/one", f"{folder}/two"])
print("lowest, highest, calls, with one folder:", shared, "with two:", apart)
wanted = ([(1.0, 1.0, 1), (1.0, 1.0, 0)], [(1.0, 1.0, 1), (2.0, 2.0, 1)])
sys.exit(0 if (shared, apart) == wanted else f"the behaviour changed: {wanted} was seen before")
PY
