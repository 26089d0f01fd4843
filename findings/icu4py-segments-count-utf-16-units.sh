#!/usr/bin/env bash
# icu4py 1.2.0: the (start, end) pairs of a breaker's `segments()` count UTF-16 units, as ICU does
# inside, not the characters that a Python string is indexed by. Slicing the text with them is right
# until the first character beyond U+FFFF (an emoji, a rarer Chinese sign), and then everything
# after it is shifted by one for each; no error, and no word of it in the help. Iterating over the
# breaker gives the right pieces as strings, so their lengths are the offsets to use.
#
# Seen ("🙂 Hello there. 🙂 Second one."): segments (0, 16), (16, 30) of a text of 28 characters;
# text[0:16] ends in the next sentence's emoji, and the strings are '🙂 Hello there. ' and
# '🙂 Second one.'.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check icu4py==1.2.0
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

from icu4py.breakers import SentenceBreaker
from icu4py.locale import Locale

text = "🙂 Hello there. 🙂 Second one."
places = list(SentenceBreaker(text, Locale("en")).segments())
seen = {
    "segments": places,
    "length": len(text),
    "sliced": [text[start:end] for start, end in places],
    "iterated": list(SentenceBreaker(text, Locale("en"))),
}
print(version("icu4py"), seen)
wanted = {
    "segments": [(0, 16), (16, 30)],
    "length": 28,
    "sliced": ["🙂 Hello there. 🙂", " Second one."],
    "iterated": ["🙂 Hello there. ", "🙂 Second one."],
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
