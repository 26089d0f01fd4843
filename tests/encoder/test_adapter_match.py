from dataclasses import replace

import pytest
from tiny_models import tiny_adapter, tiny_model

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig, require_as_trained
from pipelines.runtime.errors import InputError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and an adapter that was trained with a prompt, a pooling and a layer of its own."""
    root = tmp_path_factory.mktemp("root")
    model = tiny_model(root / "model")
    adapter = tiny_adapter(root / "adapter", model)
    config = EncoderConfig(
        model=str(model), adapter=str(adapter), prompt="cluster", pooling="last+mean", layer=3
    )
    describe_encoder(config).save(str(adapter))
    return str(model), str(adapter)


def described(folders, **settings):
    model, adapter = folders
    return describe_encoder(EncoderConfig(**{"model": model, "adapter": adapter, **settings}))


def test_what_is_left_open_is_the_adapters_own(folders):
    found = described(folders)
    assert found.prompt.endswith("belongs to the following cluster:")
    assert (found.pooling, found.layers, found.dimension) == ("last+mean", (3,), 128)
    require_as_trained(found, folders[1])


def test_without_an_adapter_what_is_left_open_is_the_default(folders):
    found = described(folders, adapter=None)
    assert found.prompt.endswith('means in one word:"')
    assert (found.pooling, found.layers) == ("last", (4,))
    require_as_trained(found, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "one-word"}, "another prompt: .*cluster.*one word.*leave --prompt out"),
        ({"pooling": "mean"}, "another pooling: 'last.mean', but this run has 'mean'"),
        ({"layer": -1}, "another layers: .*leave --layer out"),
        ({"append_eos": True}, "another append_eos: False"),
    ],
)
def test_contradictions_are_refused_with_both_values_and_a_way_out(folders, settings, message):
    found = described(folders, **settings)
    with pytest.raises(InputError, match=message):
        require_as_trained(found, folders[1])


def test_another_base_model_is_refused_with_the_one_to_name(folders, tmp_path):
    other = tiny_model(tmp_path / "other", seed=5)
    found = described(folders, model=str(other))
    with pytest.raises(InputError, match=f"another base model: .*pass --model {folders[0]}"):
        require_as_trained(found, folders[1])


def test_a_hub_commit_and_a_digest_of_files_are_not_compared(folders):
    found = replace(described(folders), model_revision="a" * 40)
    require_as_trained(found, folders[1])


def test_an_adapter_that_does_not_say_goes_with_any_prompt(folders, tmp_path):
    adapter = str(tiny_adapter(tmp_path / "adapter", folders[0]))
    found = described(folders, adapter=adapter, prompt="none")
    require_as_trained(found, adapter)
