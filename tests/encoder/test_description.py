import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from tiny_models import tiny_adapter, tiny_model

from pipelines.encoder import precision
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig, EncoderDescription, difference
from pipelines.encoder.encoder import Encoder
from pipelines.runtime.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "llama")


def describe(folder, **settings):
    return describe_encoder(EncoderConfig(model=str(folder), **{"dtype": "float32", **settings}))


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("prompt", {"prompt": "none"}),
        ("pooling", {"pooling": "mean"}),
        ("layers", {"layer": 2}),
        ("max_tokens", {"max_tokens": 128}),
        ("normalize", {"normalize": False}),
        ("dtype", {"dtype": "bfloat16"}),
        ("dtype", {"dtype": "int8"}),
        ("append_eos", {"append_eos": True}),
    ],
)
def test_each_deciding_field_changes_the_fingerprint_and_is_named(folder, field, settings):
    first, second = describe(folder), describe(folder, **settings)
    assert first.fingerprint != second.fingerprint
    assert difference(first, second).startswith(f"{field}: ")


def test_the_adapter_decides(folder, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter", folder)
    assert difference(describe(folder), describe(folder, adapter=str(adapter))).startswith(
        "adapter_revision: None and "
    )


def test_equal_encoders_written_differently_have_one_fingerprint(folder):
    first = describe(folder, layer=-1, prompt="none")
    second = describe(folder, layer=4, prompt="{text}")
    assert first.fingerprint == second.fingerprint
    assert difference(first, second) is None


def test_a_copied_model_keeps_its_fingerprint(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert describe(folder).fingerprint == describe(tmp_path / "copy").fingerprint


def test_a_changed_model_is_not_loaded_in_place_of_the_described_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    description = describe(tmp_path / "copy")
    tiny_model(tmp_path / "copy", seed=1)
    with pytest.raises(InputError, match="not the one described"):
        description.fetch()


def test_encoder_json_round_trips(folder, tmp_path):
    description = describe(folder, layer=(1, -1))
    description.save(str(tmp_path))
    assert EncoderDescription.load(str(tmp_path)) == description


def test_encoder_json_edited_by_hand_is_refused(folder, tmp_path):
    describe(folder).save(str(tmp_path))
    path = tmp_path / "encoder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pooling": "mean"}))
    with pytest.raises(InputError, match="changed by hand"):
        EncoderDescription.load(str(tmp_path))


def test_a_folder_without_encoder_json_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no encoder\.json"):
        EncoderDescription.load(str(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "median"},
        {"dtype": "int4"},
        {"max_tokens": 0},
        {"layer": ()},
        {"prompt": "no place"},
    ],
)
def test_bad_settings_are_refused_at_once(settings):
    with pytest.raises(InputError):
        EncoderConfig(**settings)


@pytest.mark.parametrize("settings", [{"layer": 5}, {"layer": -6}, {"max_tokens": 5000}])
def test_settings_beyond_the_model_are_refused(folder, settings):
    with pytest.raises(InputError):
        describe(folder, **settings)


def test_auto_dtype_is_settled_by_where_the_encoder_will_run(folder):
    config = EncoderConfig(model=str(folder))
    assert describe_encoder(config, device="cuda").dtype == "bfloat16"
    assert describe_encoder(config, device="cpu").dtype in ("bfloat16", "float32")


@pytest.mark.parametrize(("gain", "dtype"), [(2.1, "bfloat16"), (1.1, "float32"), (0.5, "float32")])
def test_auto_is_what_was_measured_faster_once(folder, tmp_path, monkeypatch, gain, dtype):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "measure_gain", lambda: gain)
    assert describe_encoder(EncoderConfig(model=str(folder)), device="cpu").dtype == dtype
    monkeypatch.setattr(precision, "measure_gain", lambda: 1 / gain)  # in a busy moment
    assert describe_encoder(EncoderConfig(model=str(folder)), device="cpu").dtype == dtype
    monkeypatch.setattr(precision, "cpu_name", lambda: "another processor")
    other = describe_encoder(EncoderConfig(model=str(folder)), device="cpu").dtype
    assert other == ("bfloat16" if dtype == "float32" and gain < 0.8 else "float32")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("flags\t\t: fpu smep avx2 avx512_bf16", "AMD EPYC (avx2 avx512_bf16)"),
        ("flags\t\t: fpu smep avx2", "AMD EPYC (avx2)"),
        ("Features\t: fp asimd sve svebf16", "AMD EPYC (asimd sve svebf16)"),
        ("bugs\t\t: avx2", "AMD EPYC"),
    ],
)
def test_processors_of_one_name_are_told_apart_by_what_they_can_do(
    tmp_path, monkeypatch, line, told
):
    cpus = tmp_path / "cpuinfo"
    monkeypatch.setattr(precision, "_CPUS", cpus)
    cpus.write_text(
        f"processor\t: 0\nmodel name\t: AMD EPYC\n{line}\n\nprocessor\t: 1\nmodel name\t: another\n"
    )
    assert precision.cpu_name() == told


def test_a_gain_is_measured():
    assert 0.01 < precision.measure_gain() < 100


def test_int8_of_an_earlier_rounding_is_told_apart_and_not_run(folder):
    mine = describe(folder, dtype="int8")
    content = {k: v for k, v in mine.to_json().items() if k != "int8_rounding"}
    earlier = replace(mine, int8_rounding=1)
    assert EncoderDescription.from_json({**content, "fingerprint": earlier.fingerprint}) == earlier
    assert difference(earlier, mine) == "int8_rounding: 1 and 2"
    with pytest.raises(InputError, match=r"by scheme 1, .* by scheme 2, .* embed the corpus anew"):
        Encoder.load(earlier, device="cpu")


def test_int8_is_refused_on_a_gpu(folder):
    with pytest.raises(InputError, match="CPUs only"):
        describe_encoder(EncoderConfig(model=str(folder), dtype="int8"), device="cuda")


def test_an_encoder_decoder_model_is_refused(tmp_path):
    import transformers

    tiny_model(tmp_path / "model")
    transformers.T5Config().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="decoder-only"):
        describe(tmp_path / "model")


def test_a_job_that_only_parses_its_flags_does_not_wait_for_torch():
    code = (
        "import sys, pipelines.encoder.description, pipelines.encoder.tokenization;"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
