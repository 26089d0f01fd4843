"""A SentencePiece file (``tokenizer.model``) as a fast tokenizer, for folders that hold no other.

transformers leaves out of such a file what its own class does not ask for: without a
``tokenizer_config.json`` the space before a text, the opening token and rules for spaces. Here the
file's own rules are kept; tokens are those of the SentencePiece library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.runtime.errors import InputError

FILE_NAME = "tokenizer.model"
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4
# Classes and kinds of models whose tokens are numbered as in the file, after an opening token.
_OPENED = ("llama", "codellama", "mistral", "mixtral", "gemma", "gemma2", "gemma3", "gemma3_text")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_sentencepiece(folder: Path) -> Any:
    """The tokenizer in ``folder``; :class:`InputError` for what has no equal here."""
    import transformers

    settings = {
        **_read(folder / "special_tokens_map.json"),
        **_read(folder / "tokenizer_config.json"),
    }
    named = settings.get("tokenizer_class")
    kind = str(named or _read(folder / "config.json").get("model_type"))
    kind = kind.removesuffix("Fast").removesuffix("Tokenizer").lower()
    if kind not in _OPENED:
        raise InputError(
            f"the tokenizer in {folder} is a {FILE_NAME} of {named or kind}; those of Llama, "
            "Mistral and Gemma are read: save it as tokenizer.json, which a fast tokenizer's "
            "save_pretrained writes"
        )
    proto = _parse(folder / FILE_NAME)
    spec = proto.trainer_spec
    ids = (spec.bos_id, spec.eos_id, spec.unk_id, spec.pad_id)
    pieces = [piece.piece for piece in proto.pieces]
    own = {role: pieces[i] for role, i in zip(_ROLES, ids, strict=True) if 0 <= i < len(pieces)}
    said = {role: _content(settings[role]) for role in _ROLES if settings.get(role)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_backend(proto, settings, folder),
        model_max_length=settings.get("model_max_length") or int(1e30),
        **{**own, **said},
    )
    put_around(
        tokenizer,
        opens=settings.get("add_bos_token", True),
        closes=settings.get("add_eos_token", False),
    )
    return tokenizer


def put_around(tokenizer: Any, *, opens: bool, closes: bool) -> None:
    """Let a tokenizer put its opening token before a text, its closing one after it, or neither."""
    from tokenizers import processors

    opening, closing = tokenizer.bos_token, tokenizer.eos_token
    single = [opening if opens else None, "$A", closing if closes else None]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[piece for piece in single if piece],
        special_tokens=[
            (token, tokenizer.convert_tokens_to_ids(token)) for token in (opening, closing) if token
        ],
    )


def _backend(proto: Any, settings: Mapping[str, Any], folder: Path) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    spec, rules = proto.trainer_spec, proto.normalizer_spec
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    users = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    controls = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    if (
        spec.model_type not in (_UNIGRAM, _BPE)
        or spec.treat_whitespace_as_suffix
        or (rules.add_dummy_prefix and users)
    ):
        raise InputError(
            f"{folder / FILE_NAME} splits texts in a way that has no equal here: save it as "
            "tokenizer.json, which a fast tokenizer's save_pretrained writes"
        )
    model: Any
    if spec.model_type == _UNIGRAM:
        model = models.Unigram(scores, spec.unk_id, spec.byte_fallback)
    else:
        model = models.BPE(
            {piece: number for number, (piece, _) in enumerate(scores)},
            _merges(scores),
            unk_token=scores[spec.unk_id][0],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    backend = Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*parts, decoders.Strip(" ", left=1)] if rules.add_dummy_prefix else parts
    )
    backend.add_special_tokens([AddedToken(c, normalized=False, special=True) for c in controls])
    # they are looked for after spaces are rewritten, so that one with a space is never met
    backend.add_tokens([AddedToken(piece, normalized=True) for piece in users if " " not in piece])
    later = sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda e: int(e[0]))
    for number, token in later:
        flags = {key: value for key, value in token.items() if key not in ("content", "__type")}
        backend.add_tokens([AddedToken(token["content"], **flags)])
        found = backend.token_to_id(token["content"])
        if found != int(number):
            raise InputError(
                f"tokenizer_config.json in {folder} gives {token['content']!r} the number "
                f"{number}, {FILE_NAME} has {found}: fetch the model again"
            )
    return backend


def _merges(scores: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The pairs that make each piece, best piece first, as SentencePiece joins them."""
    numbers = {piece: number for number, (piece, _) in enumerate(scores)}
    merges = []
    for piece, score in scores:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in numbers and pair[1] in numbers:
                merges.append((-score, numbers[pair[0]], numbers[pair[1]], pair))
    return [pair for *_, pair in sorted(merges)]


def _parse(path: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from transformers.convert_slow_tokenizer import import_protobuf

    try:
        return import_protobuf().ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(f"{path} is no SentencePiece file: fetch the model again") from error


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
