"""How an embedding model is used, as its folder says it: the files of sentence-transformers.

``modules.json`` lists what follows the transformer; each module has a folder of settings. What is
read is used as it stands there; what has no equal here is refused by its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors

from pipelines.encoder.sources import check_safetensors
from pipelines.runtime.errors import InputError

MODES = {
    "lasttoken": "last",
    "mean": "mean",
    "weightedmean": "weighted-mean",
    "max": "max",
    "cls": "first",
    "mean_sqrt_len_tokens": "mean-sqrt",
}
_OLD_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TRANSFORMER_SETTINGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
_TO_TOKENIZER = ("processor_kwargs", "tokenizer_args")
# What a Transformer passes on to the libraries below it, by its new and its old name.
_PASSED_ON = (
    _TO_TOKENIZER,
    ("model_kwargs", "model_args"),
    ("config_kwargs", "config_args"),
    ("processing_kwargs",),
)
_DECIDES_NOTHING = (
    "attn_implementation", "cache_dir", "device_map", "dtype", "local_files_only",
    "low_cpu_mem_usage", "padding_side", "token", "torch_dtype", "trust_remote_code",
    "unpad_inputs", "use_cache", "use_fast", "use_memory_efficient_attention", "use_safetensors",
)  # fmt: skip
# What a Transformer's own settings may say; the library itself refuses all else.
_SAID = (
    "transformer_task", "modality_config", "module_output_name", "unpad_inputs", "max_seq_length",
    "do_lower_case", "backend",
)  # fmt: skip
LATE_LISTS = ("mamba", "mamba2", "falcon_mamba", "rwkv")
"""Models whose list of states begins after the first layer there, not with the embeddings."""
_DOCUMENTS = ("document", "passage", "corpus")
_LENGTHS = ("query_length", "document_length", "query_expansion")
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
_AFTER_POOLING = ("Dense", "Normalize", "Dropout")  # dropout does nothing outside training


@dataclass(frozen=True)
class ModelUsage:
    """What a model's folder says about its use."""

    pooling: str
    layer: int = -1
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What is written before a text, by name."""
    default_prompt: str = ""
    max_tokens: int | None = None
    """Most tokens of prompt, text and special tokens together."""
    lower_case: bool = False
    pool_prompt: bool = True
    projections: tuple[tuple[str, str], ...] = ()
    """Folders of Dense modules within the model's, each with its digest."""
    pooled_dimension: int | None = None
    """Length of a vector before the projections, where there are any."""
    dimension: int | None = None
    """Length of a vector after them."""
    normalize: bool = False
    dimensions: int | None = None
    """Numbers that are kept of a vector."""

    @property
    def query_prompt(self) -> str:
        """What is written before a query; the default prompt is not, as in ``encode_query``."""
        return self.prompts.get("query") or ""

    @property
    def document_prompt(self) -> str:
        """What is written before a document that is searched for; none by default."""
        return next(filter(None, map(self.prompts.get, _DOCUMENTS)), "")


def read_usage(folder: Path, name: str) -> ModelUsage | None:
    """The usage that a folder tells; None where it tells none.

    Raises :class:`InputError` for modules and settings that have no equal here.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = [(_kind(module, name), module["path"]) for module in _read(folder / "modules.json")]
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or modules[0][1] != "":
        raise InputError(
            f"model {name!r} is made of {', '.join(kinds)}: a Transformer at the top of the "
            "folder and a Pooling must come first"
        )
    for kind in kinds[2:]:
        if kind not in _AFTER_POOLING:
            raise InputError(f"model {name!r} has the module {kind}, which has no equal here")
    if "Normalize" in kinds and "Dense" in kinds[kinds.index("Normalize") :]:
        raise InputError(f"model {name!r} has a Dense after a Normalize, which has no equal here")
    for path in [path for kind, path in modules if kind == "Normalize"]:
        if not _is_of_sentences(_read(folder / path / "config.json", {})):
            raise InputError(
                f"model {name!r} normalises other vectors than the sentence's, which has no equal "
                "here"
            )
    transformer: dict[str, Any] = next(
        (_read(folder / f) for f in _TRANSFORMER_SETTINGS if (folder / f).is_file()), {}
    )
    settings = _read(folder / "config_sentence_transformers.json", {})
    if settings.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise InputError(
            f"model {name!r} is a {settings['model_type']}: a SentenceTransformer is required"
        )
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise InputError(
            f"model {name!r} has no prompt {default!r}, its default; it has {sorted(prompts)}"
        )
    if _read(folder / "tokenizer_config.json", {}).get("truncation_side") == "left":
        raise InputError(
            f"model {name!r} reads the end of a long text (truncation_side in "
            "tokenizer_config.json), here it is the beginning: set it to right if that does as well"
        )
    pooling = _read(folder / modules[1][1] / "config.json")
    tokenizer = _tokenizer_limit(transformer, name)
    dense = [path for kind, path in modules if kind == "Dense"]
    settled = [check_dense(folder / path, name) for path in dense]
    widths = [module["out_features"] for module in settled]
    for before, after in pairwise(settled):
        if before["out_features"] != after["in_features"]:
            raise InputError(
                f"model {name!r}: a Dense of {before['out_features']} numbers is followed by one "
                f"that takes {after['in_features']}: fetch the model again"
            )
    return ModelUsage(
        pooling=_pooling(pooling, name),
        layer=_layer(transformer, _read(folder / "config.json").get("model_type"), name),
        prompts=prompts,
        default_prompt=prompts.get(default) or "",
        max_tokens=tokenizer or transformer.get("max_seq_length"),
        lower_case=bool(transformer.get("do_lower_case")),
        pool_prompt=bool(pooling.get("include_prompt", True)),
        projections=tuple((path, digest_module(folder / path)) for path in dense),
        pooled_dimension=settled[0]["in_features"] if settled else None,
        dimension=widths[-1] if widths else None,
        normalize="Normalize" in kinds,
        dimensions=settings.get("truncate_dim"),
    )


def _kind(module: Mapping[str, Any], name: str) -> str:
    package, _, kind = str(module.get("type")).rpartition(".")
    if package.split(".")[0] != "sentence_transformers":
        raise InputError(
            f"model {name!r} has the module {module.get('type')}, code of its own, which is not run"
        )
    return kind


def _pooling(settings: Mapping[str, Any], name: str) -> str:
    modes = settings.get("pooling_mode") or [m for f, m in _OLD_FLAGS.items() if settings.get(f)]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise InputError(f"model {name!r} pools by {unknown}, which has no equal here")
    return "+".join(MODES[mode] for mode in modes)


def _tokenizer_limit(transformer: Mapping[str, Any], name: str) -> int | None:
    """The limit in what a Transformer passes on; :class:`InputError` for all else that decides."""
    limit = None
    for keys in _PASSED_ON:
        for key, value in next((transformer[k] for k in keys if transformer.get(k)), {}).items():
            if key == "model_max_length" and keys == _TO_TOKENIZER:
                limit = int(value)
            elif key not in _DECIDES_NOTHING:
                raise InputError(
                    f"model {name!r}: its Transformer is loaded with {key} = {value!r} ({keys[0]}),"
                    " which has no equal here"
                )
    return limit


def _layer(transformer: Mapping[str, Any], kind: str | None, name: str) -> int:
    known = {*_SAID, *_LENGTHS, *(key for keys in _PASSED_ON for key in keys)}
    unknown = sorted({key for key, value in transformer.items() if value is not None} - known)
    if unknown:
        raise InputError(
            f"model {name!r}: its Transformer has the setting {unknown[0]!r}, which has no equal "
            "here"
        )
    task = transformer.get("transformer_task", "feature-extraction")
    text = (transformer.get("modality_config") or {"text": {}}).get("text")
    output = None if text is None else text.get("method_output_name", "last_hidden_state")
    if text is not None and text.get("method", "forward") != "forward":
        output = text["method"]
    lengths = [key for key in _LENGTHS if transformer.get(key)]
    if task == "feature-extraction" and not lengths:
        if output == "last_hidden_state":
            return -1
        if isinstance(output, list) and output[0] == "hidden_states" and kind not in LATE_LISTS:
            return int(output[1])
    raise InputError(
        f"model {name!r}: its Transformer has the task {task!r} and the output {output!r}"
        f"{' and ' + ', '.join(lengths) if lengths else ''}, which has no equal here"
    )


def check_dense(folder: Path, name: str) -> Mapping[str, Any]:
    """The settings of a Dense module; :class:`InputError` for what has no equal here."""
    settings = _read(folder / "config.json")
    activation = settings.get("activation_function", "torch.nn.Tanh")
    known = activation.startswith("torch.nn.") and activation.rsplit(".", 1)[-1] in _ACTIVATIONS
    if not known or settings.get("use_residual") or not _is_of_sentences(settings):
        raise InputError(
            f"model {name!r}: the Dense in {folder.name} has settings that have no equal here; an "
            f"activation of {', '.join(_ACTIVATIONS)}, no residual, from and to the sentence's "
            "vector are required"
        )
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"model {name!r}: the Dense in {folder.name} has no model.safetensors")
    check_safetensors(folder / "model.safetensors")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    width = settings.get("out_features")
    wanted = {"linear.weight": [width, settings.get("in_features")]}
    if settings.get("bias", True):
        wanted["linear.bias"] = [width]
    if shapes != wanted:
        raise InputError(
            f"model {name!r}: the Dense in {folder.name} has weights {shapes}, its config.json "
            f"calls for {wanted}: fetch the model again"
        )
    return settings


def _is_of_sentences(settings: Mapping[str, Any]) -> bool:
    """Whether a module reads and writes the vector of a sentence."""
    places = {settings.get(key) for key in ("module_input_name", "module_output_name")}
    return places <= {None, "sentence_embedding"}


def digest_module(folder: Path) -> str:
    """SHA-256 of a module's settings and weights."""
    digest = hashlib.sha256()
    for file in ("config.json", "model.safetensors"):
        digest.update((folder / file).read_bytes())
    return digest.hexdigest()


def _read(path: Path, default: Any = None) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if default is not None:
            return default
        raise InputError(f"{path.parent} is incomplete: it has no {path.name}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: fetch the model again") from error
