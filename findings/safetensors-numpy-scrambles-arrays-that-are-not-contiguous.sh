#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save_file writes the memory of an array and the shape of its
# view: a transposed, reversed, strided or column-major array (as np.linalg and pandas give) is stored
# with its numbers in other places. No error, no warning; shape and dtype are right when it is read.
# Byte order is handled, and safetensors.torch refuses such a tensor.
#
# Guess that failed: the array is copied first, or refused.
# Seen, read back equal: as it is yes; big-endian yes; transposed no; column-major no;
#   every second column no; reversed no
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

plain = np.arange(12, dtype=np.float32).reshape(3, 4)
arrays = {
    "as it is": plain,
    "big-endian": plain.astype(">f4"),
    "transposed": plain.T,
    "column-major": np.asfortranarray(plain),
    "every second column": plain[:, ::2],
    "reversed": plain[::-1],
}
save_file(arrays, f"{sys.argv[1]}/a.safetensors")
stored = load_file(f"{sys.argv[1]}/a.safetensors")
assert all(stored[name].shape == array.shape for name, array in arrays.items())
seen = {name: np.array_equal(stored[name], array) for name, array in arrays.items()}
print(safetensors.__version__, seen)
wanted = dict(zip(arrays, [True, True, False, False, False, False], strict=True))
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
