"""An encoder as asked for becomes a description: everything settled and checked, no weight read.

What the flags leave open is taken from the adapter, if it says what it was trained with, then from
the model's folder, if it says how it is used. Names and shapes of weights stand in their files'
headers, so most of what cannot run is refused here, before a worker starts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

from pipelines.encoder.adapters import added_tokens, foreign_class
from pipelines.encoder.description import (
    AUTO_ADAPTER,
    DEFAULT_LAYER,
    DEFAULT_MAX_TOKENS,
    DEFAULT_POOLING,
    DEFAULT_PROMPT,
    INT8_ROUNDING,
    NO_ADAPTER,
    TOKENIZATION,
    WINDOWS,
    EncoderConfig,
    EncoderDescription,
    pooled_dimension,
    trained_encoder,
    untrained_field,
)
from pipelines.encoder.model_code import check_code, digest_code
from pipelines.encoder.precision import resolve_dtype
from pipelines.encoder.prompts import PLACEHOLDER, PromptTemplate
from pipelines.encoder.remembered import remember
from pipelines.encoder.sources import (
    PACKAGED_ADAPTER,
    PACKAGED_MODEL,
    ModelFiles,
    fetch_adapter,
    fetch_model,
    load_model_settings,
)
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.encoder.usage import ModelUsage, read_usage
from pipelines.runtime.errors import InputError

log = logging.getLogger(__name__)

# Tokenizers without a limit say a huge number.
_UNLIMITED_TOKENS = 10_000_000
# Models that write text, and whose layers see all of it.
_BOTH_WAYS_IN_SPITE = ("bert-generation", "cpmant", "xlnet")


def describe_encoder(config: EncoderConfig, *, device: str = "auto") -> EncoderDescription:
    """Resolve a configuration without loading weights.

    Fetches the model's files, reads its configuration and settles what ``auto`` means, so that
    everyone who loads the description makes the same vectors.

    Args:
        config: the encoder as asked for.
        device: where it will run: ``cpu``, ``cuda``, or ``auto`` for this machine's best.

    Raises:
        InputError: unknown model or adapter, an adapter of another model, a layer the model does
            not have, a text limit beyond the model's positions, a model that is no single stack of
            layers or that cannot be loaded here, and a folder whose use has no equal here.
    """
    config = replace(config, dtype=cast(Any, resolve_dtype(config.dtype, device)))
    if config.adapter == NO_ADAPTER:
        config = replace(config, adapter=None)
    if config.trust_remote_code:
        return _describe(config)
    read = [fetch_model(config.model, config.revision)]
    if config.adapter == AUTO_ADAPTER:
        read += [fetch_adapter(PACKAGED_ADAPTER)] if config.model == PACKAGED_MODEL else []
    elif config.adapter is not None:
        read.append(fetch_adapter(config.adapter))
    known = [asdict(config), [(files.revision, files.listing()) for files in read]]
    described = remember("encoder", known, lambda: _describe(config).to_json())
    return EncoderDescription.from_json(described)


def _describe(config: EncoderConfig) -> EncoderDescription:
    """The description, with a dtype that is settled; takes seconds, nearly all to load torch."""
    if config.adapter == AUTO_ADAPTER:
        return _describe_with_default_adapter(config)
    model = fetch_model(config.model, config.revision)
    adapter = None if config.adapter is None else fetch_adapter(config.adapter)
    trained = None if adapter is None else trained_encoder(adapter.folder)
    settings = load_model_settings(model.folder, config.trust_remote_code)
    check_code(model.folder, config, trained)
    usage = read_usage(model.folder, config.model)
    settled = settle(config, trained, usage)
    layers, pooling = settled["layers"], settled["pooling"]
    check_layers(layers, settings.num_hidden_layers, config.model)
    attention = settle_attention(config, settings, trained, adapter)
    tokenizer = limited_tokenizer(config, model, settings, usage, settled["prompt"])
    check_added_tokens(config, model, adapter, settled["prompt"])
    queries = tokenizer.max_tokens
    if settled["query_prompt"] is not None and usage is not None:
        prompt = settled["query_prompt"]
        queries = limited_tokenizer(config, model, settings, usage, prompt).max_tokens
    last = check_loading(config, model, adapter, attention, tokenizer) or settings.hidden_size
    inner = [n for n in layers if n % (settings.num_hidden_layers + 1) < settings.num_hidden_layers]
    if inner and last != settings.hidden_size and len(layers) > len(inner):
        raise InputError(
            f"{config.model} has {last} numbers a token after its last layer and "
            f"{settings.hidden_size} after others: they have no average, name one layer"
        )
    width = pooled_dimension(pooling, settings.hidden_size if inner else last)
    own_head = usage is not None and config.pooling in (None, usage.pooling)
    projections = usage.projections if usage is not None and own_head else ()
    if usage is not None and projections and usage.pooled_dimension != width:
        raise InputError(
            f"{config.model} pools to {width} numbers, its Dense takes {usage.pooled_dimension}: "
            "fetch the model again"
        )
    dimension = usage.dimension if usage is not None and projections else width
    dimensions = config.dimensions or (usage.dimensions if usage is not None else None)
    if dimensions is not None and dimensions > (dimension or width):
        raise InputError(f"dimensions is {dimensions}, but vectors have {dimension} numbers")
    return EncoderDescription(
        model=config.model,
        model_revision=model.revision,
        adapter=config.adapter,
        adapter_revision=None if adapter is None else adapter.revision,
        prompt=settled["prompt"],
        pooling=pooling,
        layers=tuple(sorted({layer % (settings.num_hidden_layers + 1) for layer in layers})),
        max_tokens=tokenizer.max_tokens,
        normalize=config.normalize,
        dtype=config.dtype,
        int8_rounding=INT8_ROUNDING if config.dtype == "int8" else 1,
        append_eos=config.append_eos,
        dimension=dimensions or dimension or width,
        trust_remote_code=config.trust_remote_code,
        attention=attention,
        windows=WINDOWS if counts_windows(settings, attention) else 1,
        dimensions=dimensions,
        lower_case=tokenizer.lower_case,
        pool_prompt=usage is None or not own_head or usage.pool_prompt,
        projections=projections,
        code_digest=digest_code(model.folder) if config.trust_remote_code else None,
        tokenization=tokenizer.version,
        query_prompt=settled["query_prompt"],
        query_max_tokens=None if queries == tokenizer.max_tokens else queries,
    )


def limited_tokenizer(
    config: EncoderConfig, model: ModelFiles, settings: Any, usage: ModelUsage | None, prompt: str
) -> PromptedTokenizer:
    """The tokenizer of texts with a prompt, cut as :func:`settle_max_tokens` says."""
    tokenizer = PromptedTokenizer.from_folder(
        model.folder,
        PromptTemplate.parse(prompt),
        max_tokens=config.max_tokens or DEFAULT_MAX_TOKENS,
        append_eos=config.append_eos,
        lower_case=usage is not None and usage.lower_case,
        trust_remote_code=config.trust_remote_code,
    )
    return tokenizer.limited(settle_max_tokens(config, settings, usage, tokenizer))


def _describe_with_default_adapter(config: EncoderConfig) -> EncoderDescription:
    """The packaged model with its adapter, unless other flags ask for what it was not trained in.

    Other models have no adapter by default.
    """
    if config.model == PACKAGED_MODEL:
        tuned = _describe(replace(config, adapter=PACKAGED_ADAPTER))
        trained = trained_encoder(fetch_adapter(PACKAGED_ADAPTER).folder)
        other = None if trained is None else untrained_field(tuned, trained)
        if other is None:
            return tuned
        log.warning(
            "the packaged adapter was trained with %s %r, %r is asked for: the model is used "
            "without it, as --adapter none does",
            other, getattr(trained, other), getattr(tuned, other),
        )  # fmt: skip
    return _describe(replace(config, adapter=None))


def settle(
    config: EncoderConfig, trained: EncoderDescription | None, usage: ModelUsage | None
) -> dict[str, Any]:
    """Prompts, pooling and layers: by flag, else as trained, else as the folder says.

    A flag that contradicts the folder is told.
    """
    asked = {"prompt": config.prompt, "pooling": config.pooling, "layers": config.layers}
    folder: dict[str, Any] = {}
    if usage is not None:
        folder = {
            "prompt": f"{usage.default_prompt}{PLACEHOLDER}",
            "pooling": usage.pooling,
            "layers": (usage.layer,),
        }
    defaults = {"prompt": DEFAULT_PROMPT, "pooling": DEFAULT_POOLING, "layers": (DEFAULT_LAYER,)}
    told: dict[str, Any] = {}
    for name, flag in asked.items():
        adapter = None if trained is None else getattr(trained, name)
        values = (flag, adapter, folder.get(name), defaults[name])
        told[name] = next(value for value in values if value is not None)
    told["prompt"] = str(PromptTemplate.parse(told["prompt"]))
    others = [n for n in folder if asked[n] is not None and told[n] != folder[n]]
    if usage is not None and usage.normalize and not config.normalize:
        others.append("normalize")
    for name in others:
        log.warning(
            "%s says %s %r for itself; %r is used, as asked for",
            config.model, name, folder.get(name, True), told.get(name, False),
        )  # fmt: skip
    own = usage is not None and told["prompt"] == folder["prompt"]
    if usage is not None and own and usage.document_prompt not in ("", usage.default_prompt):
        log.info(
            "%s has a prompt for documents that are searched for, which encode() leaves out, as is "
            "done here: --prompt %r for such a store",
            config.model, f"{usage.document_prompt}{PLACEHOLDER}",
        )  # fmt: skip
    query = config.query_prompt
    if query is None and trained is not None and config.prompt is None:
        query = trained.query_prompt
    if query is None and usage is not None and own:
        query = f"{usage.query_prompt}{PLACEHOLDER}"
    query = None if query is None else str(PromptTemplate.parse(query))
    return {**told, "query_prompt": None if query == told["prompt"] else query}


def settle_max_tokens(
    config: EncoderConfig, settings: Any, usage: ModelUsage | None, tokenizer: PromptedTokenizer
) -> int:
    """Tokens of a text: as asked for, else what the folder's limit leaves, else the default."""
    if config.max_tokens is not None or usage is None:
        return config.max_tokens or DEFAULT_MAX_TOKENS
    # a folder may ask for more than its model has, where they are computed and not learned
    beyond = usage.max_tokens is not None and getattr(settings, "rope_parameters", None)
    positions = None if beyond else count_positions(settings)
    limits = [usage.max_tokens or tokenizer.tokenizer.model_max_length, positions]
    limit = min(int(limit) for limit in limits if limit is not None)
    around = tokenizer.prefix_tokens + tokenizer.suffix_tokens
    if limit > _UNLIMITED_TOKENS:
        return DEFAULT_MAX_TOKENS
    if limit <= around:
        raise InputError(
            f"{config.model} reads {limit} tokens, and the prompt and special tokens are {around} "
            "already: take a shorter prompt"
        )
    return limit - around


def count_positions(settings: Any) -> int | None:
    """Tokens that a model was made for; None where its configuration sets no bound (XLNet: -1)."""
    positions = getattr(settings, "max_position_embeddings", None)
    return None if positions is None or positions < 1 else positions


def settle_attention(
    config: EncoderConfig,
    settings: Any,
    trained: EncoderDescription | None,
    adapter: ModelFiles | None,
) -> str | None:
    """The attention to ask the model for; None for its own."""
    from pipelines.encoder.base_model import BOTH_WAYS, OWN_WORD  # slow, as torch is

    unheeded = getattr(settings, BOTH_WAYS, None) is True and settings.model_type not in OWN_WORD
    if config.attention != "auto":
        own = None if unheeded else own_attention(settings)
        return None if config.attention == own else config.attention
    if trained is not None:
        return trained.attention
    foreign = None if adapter is None else foreign_class(adapter.folder)
    if foreign is not None:
        raise InputError(
            f"adapter {config.adapter} was trained on {foreign}, which is not the model's class: "
            "pass --attention bidirectional or --attention causal, as that class attends"
        )
    if unheeded:
        raise InputError(
            f"config.json of {config.model} has {BOTH_WAYS}, which {settings.model_type} does not "
            "heed in every batch: pass --attention bidirectional or causal, as it was trained"
        )
    return None


def counts_windows(settings: Any, attention: str | None) -> bool:
    """Whether a model counts windows in another way under an attention that is not its own."""
    from pipelines.encoder.base_model import OWN_WORD

    return attention is not None and settings.model_type in OWN_WORD


def own_attention(settings: Any) -> str | None:
    """How a model attends by its own configuration; None where only a trial can tell.

    That is so for the text layers of models of images, which are in neither of transformers' lists.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    from pipelines.encoder.base_model import says_both_ways

    kind = type(settings)
    if says_both_ways(settings):
        return "bidirectional"
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(settings, "is_decoder", False):
        return "bidirectional"
    if settings.model_type in _BOTH_WAYS_IN_SPITE and not getattr(settings, "is_decoder", False):
        return "bidirectional"
    return "causal" if kind in MODEL_FOR_CAUSAL_LM_MAPPING else None


def check_layers(layers: Sequence[int], count: int, name: str) -> None:
    """Refuse layers that a model of ``count`` layers does not have."""
    for layer in layers:
        if not -count - 1 <= layer <= count:
            raise InputError(
                f"layer {layer} does not exist: {name} has {count} layers, so 0 to "
                f"{count}, or -1 to {-count - 1} counted from the end"
            )


def check_added_tokens(
    config: EncoderConfig, model: ModelFiles, adapter: ModelFiles | None, prompt: str
) -> None:
    """Refuse a prompt with tokens that only the adapter's own tokenizer knows."""
    if adapter is None or not (model.folder / "tokenizer.json").is_file():
        return
    new = added_tokens(adapter.folder) - added_tokens(model.folder)
    used = sorted(token for token in new if token in prompt)
    if used:
        raise InputError(
            f"the prompt holds {used[0]!r}, a token that only the tokenizer of adapter "
            f"{config.adapter} knows: merge it with PEFT, save its tokenizer with the result, and "
            "give that folder as --model"
        )


def check_loading(
    config: EncoderConfig,
    model: ModelFiles,
    adapter: ModelFiles | None,
    attention: str | None,
    tokenizer: PromptedTokenizer,
) -> int | None:
    """Refuse weights, an adapter and a text limit that the model cannot run with.

    Returns how many numbers a token has after the last layer, None where that is not known yet.
    Reads names and shapes alone. A model whose code cannot be run so is checked when it is loaded.
    """
    import torch

    from pipelines.encoder.base_model import load_base_model

    positions = count_positions(load_model_settings(model.folder, config.trust_remote_code))
    if positions is not None and (config.max_tokens or 0) > positions:
        raise InputError(
            f"max_tokens is {config.max_tokens}, but {config.model} has {positions} positions"
        )
    if config.trust_remote_code:
        return None
    try:
        loaded = load_base_model(
            model.folder,
            dtype=torch.float32,
            device=torch.device("meta"),
            adapter=None if adapter is None else adapter.folder,
            attention=attention,
        )
    except (RuntimeError, NotImplementedError) as error:
        log.debug("%s cannot be checked without its weights: %s", config.model, error)
        return None
    check_rows(tokenizer, loaded, config.model)
    check_positions(tokenizer, loaded, positions, config.model)
    return try_on_text(loaded, config)


def check_positions(
    tokenizer: PromptedTokenizer, model: Any, positions: int | None, name: str
) -> None:
    """Refuse a text limit and a prompt that are longer together than a model can read.

    ``positions`` is what its configuration says that it was made for.
    """
    from pipelines.encoder.base_model import learned_positions
    from pipelines.encoder.packed import ropes_of

    most = learned_positions(model.get_decoder())
    if any(rope.get("rope_type") == "dynamic" for rope in ropes_of(model.config.get_text_config())):
        # beyond them a text's vector would depend on the longest text that was read before it
        most = positions
    if most is not None and tokenizer.most_tokens > most:
        around = tokenizer.prefix_tokens + tokenizer.suffix_tokens
        raise InputError(
            f"{tokenizer.max_tokens} tokens of text and {around} of prompt and special tokens, but "
            f"{name} has {most} positions: --max-tokens {most - around} at most"
        )


def check_prompts(description: EncoderDescription, prompts: Collection[str]) -> None:
    """Refuse other prompts for an encoder with which its texts are longer than its model can read.

    A model whose code cannot be run without its weights is not checked.
    """
    import torch

    from pipelines.encoder.base_model import load_base_model

    if not prompts or description.trust_remote_code:
        return
    folder = description.fetch()[0].folder
    try:
        loaded = load_base_model(folder, dtype=torch.float32, device=torch.device("meta"))
    except (RuntimeError, NotImplementedError) as error:
        log.debug("%s cannot be checked without its weights: %s", description.model, error)
        return
    positions = count_positions(load_model_settings(folder))
    for prompt in prompts:
        template = str(PromptTemplate.parse(prompt))
        other = replace(description, prompt=template, tokenization=TOKENIZATION)
        check_positions(PromptedTokenizer.load(other), loaded, positions, description.model)


def check_rows(tokenizer: PromptedTokenizer, model: Any, name: str) -> None:
    """Refuse tokens that the embeddings have no rows for, where texts or the prompt may hold them.

    Control tokens that were added without rows do no harm: a text that spells them is plain text.
    """
    try:
        rows = len(model.get_input_embeddings().weight)
    except NotImplementedError:
        return
    own = tokenizer.tokenizer
    controls = {number for number, token in own.added_tokens_decoder.items() if token.special}
    vocabulary = {number: token for token, number in own.get_vocab().items()}
    met = {*(set(vocabulary) - controls), *tokenizer.head, *tokenizer.tail}
    beyond = sorted(number for number in met if number >= rows)
    if beyond:
        raise InputError(
            f"the tokenizer of {name} has {vocabulary.get(beyond[0])!r} as token {beyond[0]}, but "
            f"the model has rows for {rows} tokens: resize its embeddings, or take the tokenizer "
            "that it was trained with"
        )


def try_on_text(model: Any, config: EncoderConfig) -> int | None:
    """Refuse a model that cannot be run on text alone, such as one of images and texts.

    Returns how many numbers a token has after the last layer; None where it cannot be tried.
    ``model`` has names and shapes only. One that looks at numbers while it runs is tried later.
    """
    import torch

    from pipelines.encoder.padded import find_layers

    find_layers(model)
    tokens = torch.zeros((1, 2), dtype=torch.long, device="meta")
    try:
        output = model(input_ids=tokens, use_cache=False)
        states = tuple(output.last_hidden_state.shape)
    except (RuntimeError, NotImplementedError) as error:
        log.debug("%s cannot be tried without its weights: %s", config.model, error)
        return None
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise InputError(
            f"{config.model} ({type(model).__name__}) cannot be run on texts alone "
            f"({(str(error) or type(error).__name__).splitlines()[0][:200]}): take another model"
        ) from error
    if len(states) != 3 or states[:2] != tuple(tokens.shape):
        raise InputError(
            f"{config.model} ({type(model).__name__}) gives states of shape {states} for a text of "
            f"{tokens.shape[1]} tokens; one state a token is required: take another model"
        )
    return states[2]
