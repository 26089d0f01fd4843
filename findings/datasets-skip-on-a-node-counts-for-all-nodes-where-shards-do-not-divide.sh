#!/usr/bin/env bash
# datasets 5.2.0: split_dataset_by_node(stream, node, nodes).skip(n) leaves out n rows of each node where
# the number of shards divides by that of the nodes, and n rows of all nodes together where it does not:
# then the rows of the stream are skipped first and dealt out afterwards, so that a node also gets rows
# that another had before. take(n) does the same. A run that goes on by skip(rows read by this node)
# trains on most of them again, on other nodes, and which it is depends on files and nodes only.
#
# Guess that failed: the rows that list(node)[n:] would be, for any number of shards
# Seen, rows 0 to 19 in four shards, skip(4): on 2 nodes 4 10 11 ... and 9 15 16 ... (6 rows each, as
#   wanted); on 3 nodes 4 7 10 ..., 5 8 11 ... and 6 9 12 ... (16 rows, of which 8 were read before);
#   take(4): 8 rows on 2 nodes, 4 rows on 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
HF_HOME=$folder HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import sys

import datasets
from datasets.distributed import split_dataset_by_node

stream = datasets.Dataset.from_dict({"row": list(range(20))}).to_iterable_dataset(num_shards=4)


def counts(nodes):
    """Rows after skip(4), those of them that were among the first four of a node, and rows of take(4)."""
    parts = [split_dataset_by_node(stream, node, nodes) for node in range(nodes)]
    read = {x["row"] for part in parts for x in list(part)[:4]}
    left = [x["row"] for part in parts for x in part.skip(4)]
    taken = [x["row"] for part in parts for x in part.take(4)]
    return len(left), len(read & set(left)), len(taken), [x["row"] for x in parts[0].skip(4)][:3]


seen = {nodes: counts(nodes) for nodes in (2, 3, 4)}
print(datasets.__version__, seen)
wanted = {2: (12, 0, 8, [4, 10, 11]), 3: (16, 8, 4, [4, 7, 10]), 4: (4, 0, 16, [4])}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
