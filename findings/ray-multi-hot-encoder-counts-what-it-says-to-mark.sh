#!/usr/bin/env bash
# ray 2.60.0: MultiHotEncoder of Ray Data is described as making a binary list (1 where a category is in
# the input, else 0, like scikit-learn's MultiLabelBinarizer) and makes counts: a document that carries
# one label twice gets a 2. What multiplies such columns, or reads them as labels of a metric, gives that
# document twice the weight.
#
# Guess that failed: the i-th element is 1 or 0, as the class says and as MultiLabelBinarizer has it
# Seen, labels [a, a, b] and [c] of a, b, c: [2, 1, 0] and [0, 0, 1]; scikit-learn: [1, 1, 0], [0, 0, 1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "ray[data]==2.60.0" pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6 scikit-learn==1.9.1
RAY_AUTH_MODE=disabled "$folder/venv/bin/python" - <<'PY'
import sys

import pandas as pd
import ray
from ray.data.preprocessors import MultiHotEncoder
from sklearn.preprocessing import MultiLabelBinarizer

ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
labels = [["a", "a", "b"], ["c"]]
documents = ray.data.from_pandas(pd.DataFrame({"labels": labels}))
coded = MultiHotEncoder(columns=["labels"]).fit_transform(documents).to_pandas()["labels"]
seen = [list(map(int, row)) for row in coded]
binary = MultiLabelBinarizer().fit_transform(labels).tolist()
print(ray.__version__, seen, "scikit-learn:", binary)
print("said to be a binary list:", "binary" in MultiHotEncoder.__doc__)
wanted = ([[2, 1, 0], [0, 0, 1]], [[1, 1, 0], [0, 0, 1]], True)
same = (seen, binary, "binary" in MultiHotEncoder.__doc__) == wanted
sys.exit(0 if same else f"the behaviour changed: {wanted} was seen before")
PY
