#!/usr/bin/env bash
# safetensors 0.8.0: save_file leaves a file of mode 0600 whatever the umask says, and takes 0644
# away from a file that it overwrites. Files that Python, NumPy or earlier releases (0.5.3) write
# have 0644 under the same umask. So a model saved into a shared folder, or packed into a wheel or an
# image, is there for whoever made it and "Permission denied" for everyone else; transformers'
# save_pretrained writes through it. No error, no warning, nothing in the call's arguments.
#
# Seen (umask 022): numpy.save 644, save_file of 0.5.3 644, of 0.8.0 600, over a file of 644: 600
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
cat > "$folder/modes.py" <<'PY'
import os
import sys

import numpy as np
from safetensors.numpy import save_file

os.umask(0o022)
folder = sys.argv[1]
np.save(f"{folder}/array.npy", np.zeros(2))
save_file({"a": np.zeros(2)}, f"{folder}/new.safetensors")
with open(f"{folder}/old.safetensors", "wb"):
    pass
os.chmod(f"{folder}/old.safetensors", 0o644)
save_file({"a": np.zeros(2)}, f"{folder}/old.safetensors")
for name in ("array.npy", "new.safetensors", "old.safetensors"):
    print(f"{os.stat(f'{folder}/{name}').st_mode & 0o777:o}", end=" ")
    os.remove(f"{folder}/{name}")
PY
pip safetensors==0.5.3 numpy==2.4.6
earlier=$("$folder/venv/bin/python" "$folder/modes.py" "$folder")
pip safetensors==0.8.0
now=$("$folder/venv/bin/python" "$folder/modes.py" "$folder")
echo "0.5.3: $earlier / 0.8.0: $now (numpy.save, a new file, a file of 644 overwritten)"
[ "$earlier" = "644 644 644 " ] && [ "$now" = "644 600 600 " ]
