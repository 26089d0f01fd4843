#!/usr/bin/env bash
# datasets 5.2.0: map(..., with_indices=True) on a stream counts from 0 in every worker of a DataLoader
# and on every node of split_dataset_by_node, so that an id made from the index is given to as many rows
# as there are workers. filter(..., with_indices=True) so keeps other rows with each number of workers
# (every third row of what the worker has). Where the shards do not divide by the nodes, so that each
# node reads all and drops what is not its own, the numbers are the stream's.
#
# Guess that failed: the place in the stream, as without workers and as with map on a Dataset and num_proc
# Seen, 20 rows in four shards: distinct indices by 0, 2 and 4 workers 20, 10 and 5; on 2, 3 and 4 nodes
#   10, 20 and 5; rows kept by index % 3 == 0 by 0, 2 and 4 workers: 0 3 6 9 12 15 18,
#   0 3 5 8 11 14 16 19 and 0 3 5 8 10 13 15 18
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    datasets==5.2.0 torch==2.13.0 pyarrow==26.0.1
HF_HOME=$folder HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")  # more workers than cores
stream = datasets.Dataset.from_dict({"row": list(range(20))}).to_iterable_dataset(num_shards=4)
numbered = stream.map(lambda _, index: {"index": index}, with_indices=True)
every_third = stream.filter(lambda _, index: index % 3 == 0, with_indices=True)


def values(data, workers, column):
    return sorted(int(x) for batch in DataLoader(data, num_workers=workers) for x in batch[column])


def of_nodes(count):
    nodes = [split_dataset_by_node(numbered, node, count) for node in range(count)]
    return len({row["index"] for node in nodes for row in node})


seen = {
    "by workers": [len(set(values(numbered, workers, "index"))) for workers in (0, 2, 4)],
    "on nodes": [of_nodes(count) for count in (2, 3, 4)],
    "kept": [values(every_third, workers, "row") for workers in (0, 2, 4)],
}
print(datasets.__version__, seen)
kept = [0, 3, 6, 9, 12, 15, 18], [0, 3, 5, 8, 11, 14, 16, 19], [0, 3, 5, 8, 10, 13, 15, 18]
wanted = {"by workers": [20, 10, 5], "on nodes": [10, 20, 5], "kept": list(kept)}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
