import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from tiny_models import SENTENCES, tiny_model

from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.gguf_files import scale_norms
from pipelines.encoder.sources import fetch_model
from pipelines.runtime.errors import InputError

ROPE = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))


def interleave(weight, heads):
    """Rows of a query or key product in the order in which llama.cpp keeps them."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    folder, path, arch="llama", *, pre="llama-bpe", scaling=None, tensors=None, bos=None,
    without=None, parts=None, more=None,
):  # fmt: skip
    """The model in ``folder`` as a GGUF file in float32, maybe ``without`` a weight."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(str(path), arch)
    if parts is not None:
        writer.add_uint16("split.count", parts)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "norm_epsilon"):
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = config.rope_parameters
    writer.add_rope_freq_base(ropes["rope_theta"])
    head = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(
        int(getattr(config, "head_dim", head) * ropes.get("partial_rotary_factor", 1))
    )
    writer.add_key_length(getattr(config, "head_dim", head))
    writer.add_value_length(getattr(config, "head_dim", head))
    for name, value in (more or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{arch}.{name}", value)
    if scaling is not None:
        writer.add_string(f"{arch}.rope.scaling.type", scaling)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(256)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    vocab += [(f"[unused{i}]", i) for i in range(len(vocab), config.vocab_size)]
    merges = [m[0] + " " + m[1] for m in _merges(tokenizer)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3, 3, 3] + [1] * (len(vocab) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if bos is not None:
        writer.add_add_bos_token(bos)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == without:
            continue
        array = weight.float().numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = interleave(array, heads)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, np.ascontiguousarray(array))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, np.array(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def rounded_model(folder, family, **settings):
    """A tiny model whose weights are bfloat16 numbers, as a conversion keeps them."""
    tiny_model(folder, family, **{"num_hidden_layers": 2, **settings})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.float().save_pretrained(folder)
    return folder


def llama3_factors(folder):
    """What llama.cpp's converter writes: by how much each frequency is slowed down."""
    plain = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    model = transformers.AutoModel.from_pretrained(folder)
    return plain / model.rotary_emb.inv_freq.numpy()


@pytest.mark.parametrize(
    ("family", "arch", "ropes", "scaling"),
    [
        ("llama", "llama", None, None),
        ("llama", "llama", LLAMA3, None),
        ("llama", "llama", {"rope_type": "linear", "factor": 4.0}, "linear"),
        ("qwen3", "qwen3", {"rope_type": "yarn", "factor": 4.0,
                            "original_max_position_embeddings": 256}, "yarn"),
        ("qwen3", "qwen3", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0,
                            "original_max_position_embeddings": 256}, "yarn"),
        ("llama", "llama", {"rope_theta": 777.0}, None),
        ("starcoder2", "starcoder2", {"rope_theta": 77777.0}, None),
        ("phi3", "phi3", {"partial_rotary_factor": 0.5}, None),
    ],
)  # fmt: skip
def test_scaled_positions_are_read(tmp_path, family, arch, ropes, scaling):
    settings = (
        {} if ropes is None else {"rope_parameters": {"rope_type": "default", **ROPE, **ropes}}
    )
    folder = rounded_model(tmp_path / family, family, **settings)
    tensors = {"rope_freqs.weight": llama3_factors(folder)} if ropes is LLAMA3 else {}
    betas = {f"rope.scaling.yarn_{k}": v for k, v in (ropes or {}).items() if "beta" in k}
    path = write_gguf(
        folder, tmp_path / "tiny.gguf", arch, scaling=scaling, tensors=tensors, more=betas
    )
    found = Encoder.load(EncoderConfig(str(path), dtype="float32", pooling="mean"), device="cpu")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    texts = [*SENTENCES, " ".join(SENTENCES)]
    rows = []
    for ids in found.tokenizer.tokenize(texts):
        with torch.no_grad():
            rows.append(model(torch.tensor([ids])).last_hidden_state[0].mean(0))
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()
    assert (found.encode(texts) * expected).sum(1).min() > 0.9999
    modes = {path.stat().st_mode for path in found.description.fetch()[0].folder.iterdir()}
    assert len(modes) == 1  # whoever may read the settings may read the weights


@pytest.mark.parametrize("name", ["yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"])
def test_factors_of_yarn_that_have_no_equal_are_refused(tmp_path, name):
    folder = rounded_model(tmp_path / "llama", "llama")
    more = {f"rope.scaling.{name}": 0.5}
    path = write_gguf(folder, tmp_path / "tiny.gguf", scaling="yarn", more=more)
    with pytest.raises(InputError, match=f"its YaRN scaling has a {name} of its own"):
        fetch_model(str(path))


def test_what_is_added_to_a_variance_is_the_files():
    config = transformers.NemotronConfig()
    said = {"general.architecture": "nemotron", "nemotron.attention.layer_norm_epsilon": 0.25}
    scale_norms(config, said)
    assert config.norm_eps == 0.25


def test_scaling_that_is_not_known_is_refused_by_name(tmp_path):
    folder = rounded_model(tmp_path / "llama", "llama")
    path = write_gguf(folder, tmp_path / "tiny.gguf", scaling="spiral")
    with pytest.raises(InputError, match="scaled by 'spiral'"):
        fetch_model(str(path))


def test_a_folder_made_offline_is_the_same(tmp_path, monkeypatch):
    folder = rounded_model(tmp_path / "llama", "llama")
    path = write_gguf(folder, tmp_path / "tiny.gguf")
    revisions = set()
    for offline in (True, False):
        monkeypatch.setenv("SHOAL_HOME", str(tmp_path / f"home {offline}"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        revisions.add(fetch_model(str(path)).revision)
    assert len(revisions) == 1


def test_a_part_of_a_model_is_refused(tmp_path):
    folder = rounded_model(tmp_path / "llama", "llama")
    path = write_gguf(folder, tmp_path / "tiny-00001-of-00003.gguf", parts=3)
    with pytest.raises(InputError, match="is one of 3 parts of a model: join them"):
        fetch_model(str(path))


def test_weights_that_the_file_lacks_are_named(tmp_path):
    folder = rounded_model(tmp_path / "llama", "llama")
    lost = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(folder, tmp_path / "tiny.gguf", without=lost)
    with pytest.raises(InputError, match=f"lacks {lost}, which would be random"):
        fetch_model(str(path))


def tokens(path, text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch_model(str(path)).folder)
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))


def test_digits_are_split_off_first_where_the_file_says_so(tmp_path):
    folder = rounded_model(tmp_path / "llama", "llama")
    path = write_gguf(folder, tmp_path / "tiny.gguf", pre="smollm")
    assert tokens(path, "\n\n42") == ["Ċ", "Ċ", "4", "2"]


def test_a_split_that_is_not_known_is_refused_by_name(tmp_path):
    folder = rounded_model(tmp_path / "llama", "llama")
    path = write_gguf(folder, tmp_path / "tiny.gguf", pre="brand-new")
    with pytest.raises(InputError, match="splits texts as 'brand-new', which is not known"):
        fetch_model(str(path))


@pytest.mark.parametrize(
    ("pre", "bos", "opens"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("qwen2", None, False),
        ("qwen2", True, True),
    ],
)
def test_texts_open_as_in_llama_cpp(tmp_path, pre, bos, opens):
    folder = rounded_model(tmp_path / "llama", "llama")
    path = write_gguf(folder, tmp_path / "tiny.gguf", pre=pre, bos=bos)
    assert (tokens(path, "a")[0] == "<s>") == opens


@pytest.mark.parametrize(
    ("tensors", "more", "message"),
    [
        ({"blk.0.attn_q.bias": [0.5] * 64}, {}, r"holds blk\.0\.attn_q\.bias, which LlamaFor"),
        ({"blk.1.attn_k_norm.weight": [0.5] * 16}, {}, r"holds blk\.1\.attn_k_norm\.weight"),
        ({"blk.2.attn_norm.weight": [1.0] * 64}, {}, r"holds blk\.2\.attn_norm\.weight"),
        ({}, {"attention.scale": 0.5}, r"its llama\.attention\.scale of 0\.5 is not read"),
        ({}, {"residual_scale": 3.0}, r"its llama\.residual_scale of 3 is not read"),
        ({}, {"rope.scaling.alpha": 2.0}, r"its llama\.rope\.scaling\.alpha of 2\.0 is not read"),
        ({}, {"attention.temperature_length": 64}, r"attention\.temperature_length of 64 is not"),
        ({}, {"expert_weights_scale": 2.5}, r"its llama\.expert_weights_scale of 2\.5 is not read"),
        ({}, {"rope.freq_base_swa": 5.0}, "the positions of its windows have a base of their own"),
        ({}, {"pooling_type": 4}, "its pooling_type 4 makes no vector"),
    ],
)
def test_what_the_model_made_of_a_file_would_leave_out_is_refused(tmp_path, tensors, more, message):
    folder = rounded_model(tmp_path / "llama", "llama")
    path = write_gguf(folder, tmp_path / "tiny.gguf", tensors=tensors, more=more)
    with pytest.raises(InputError, match=message):
        fetch_model(str(path))


def test_an_embedding_models_file_says_how_it_attends_and_pools(tmp_path):
    folder = rounded_model(tmp_path / "llama", "llama")
    said = {"attention.causal": False, "pooling_type": 1}
    path = write_gguf(folder, tmp_path / "tiny.gguf", more=said)
    encoder = Encoder.load(EncoderConfig(str(path), dtype="float32"), device="cpu")
    description = encoder.description
    assert (description.pooling, description.prompt) == ("mean", "{text}")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.is_causal = False
    model = transformers.AutoModel.from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        states = [
            model(torch.tensor([ids])).last_hidden_state[0].mean(0)
            for ids in encoder.tokenizer.tokenize(SENTENCES)
        ]
    expected = torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()
    assert (encoder.encode(SENTENCES) * expected).sum(1).min() > 0.9999
