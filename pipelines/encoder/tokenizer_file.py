"""The rules that stand in a ``tokenizer.json``, which classes of transformers may leave out.

A class that builds its tokenizer anew takes vocabulary and special tokens from the file and splits
texts by rules of its own: SmolLM2 and StarCoder2 name GPT-2's class, whose rules do not split
digits off. Whoever saved the file read texts by it, so it decides here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.runtime.errors import InputError

FILE_NAME = "tokenizer.json"
TELLING_TEXTS = (
    "a",
    "The word",
    "In 2024, 67 people\n\n42 1234567",
    "  two  spaces\tand   3 more \n\n\n end ",
    "It's HE'LL naïve Café ﬁne x² …",
    "foo_bar(x)==-1; http://a.bc/d?e=f#g $5.00 50%",
    "日本語の文。 Привет мир 한국어 नमस्ते 😀",
)
"""What tells one way of splitting from another: digits, runs of spaces and lines, case, accents,
apostrophes, marks, other scripts."""
# What tokenizer_config.json may say of a BERT's normaliser, by its name there.
_BERT_RULES = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def keep_rules(tokenizer: Any, folder: Path) -> bool:
    """Give a tokenizer the rules of the file in ``folder``; whether it read some texts otherwise.

    Settings of ``tokenizer_config.json`` about letters' case and the space before a text go on
    top, as they always have.
    """
    import tokenizers

    built_anew = type(tokenizer).__module__.startswith("transformers.models.")
    if not built_anew or not tokenizer.is_fast or not (folder / FILE_NAME).is_file():
        return False
    own = tokenizers.Tokenizer.from_file(str(folder / FILE_NAME))
    backend = tokenizer.backend_tokenizer
    before = [_read_by(backend, text) for text in TELLING_TEXTS]
    backend.model = own.model
    backend.normalizer, backend.pre_tokenizer = _with_settings(
        own, _read(folder / "tokenizer_config.json")
    )
    return before != [_read_by(backend, text) for text in TELLING_TEXTS]


def require_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer that reads all texts alike, as one does whose vocabulary was not found."""
    found = tokenizer(list(TELLING_TEXTS), add_special_tokens=False, verbose=False)["input_ids"]
    if len({tuple(ids) for ids in found}) == 1:
        raise InputError(
            f"the tokenizer in {folder}, a {type(tokenizer).__name__}, reads all texts alike: it "
            f"does not find its vocabulary; fetch the model again, with its {FILE_NAME}"
        )


def _with_settings(own: Any, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    from tokenizers import normalizers, pre_tokenizers

    normalizer, splitter = own.normalizer, own.pre_tokenizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        for key, rule in _BERT_RULES.items():
            if settings.get(key) is not None:
                setattr(normalizer, rule, settings[key])
    spaced = settings.get("add_prefix_space")
    if spaced is not None and isinstance(splitter, pre_tokenizers.ByteLevel):
        splitter.add_prefix_space = spaced
    return normalizer, splitter


def _read_by(backend: Any, text: str) -> list[int] | None:
    """Tokens of a text; None where these rules cannot read it."""
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except Exception:  # noqa: BLE001 - the only kind that the tokenizers library raises
        return None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
