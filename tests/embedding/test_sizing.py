import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.embedding.sizing import MEASURED, Sizing, main, nightly, stages_of, storage_bytes
from pipelines.runtime.errors import InputError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CORES = 2  # of the machine that these were measured on
SMALL = Sizing(documents=1_000_000, tokens_per_document=100, tokens_per_second=1_000.0)


def seconds(config: Sizing) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in stages_of(config)}


def test_rates_are_those_that_were_measured():
    state = json.loads((RESULTS / "pipeline.json").read_text())["state"]
    cluster = json.loads((RESULTS / "kmeans.json").read_text())["on_disk"]
    found = {
        "read": state["documents"] / state["seconds"]["first"]["all"] / CORES,
        "cluster": cluster["rows_assigned"] / (cluster["seconds"] / 2) / CORES,
        "work_bytes": state["work_mib"] * 2**20 / state["documents"],
    }
    assert found == pytest.approx(MEASURED, rel=0.01)


def test_a_measured_encoder_takes_tokens_over_rate_and_actors():
    assert seconds(SMALL)["embed"] == 1_000_000 * 100 / (1_000 * SMALL.accelerators)


def test_without_a_measure_the_rate_is_two_operations_a_parameter_at_a_share_of_the_peak():
    guess = Sizing(model_parameters=1e9, peak_teraflops=100, utilization=0.5)
    assert guess.actor_tokens_per_second == 100e12 * 0.5 / 2e9


def test_twice_the_documents_take_twice_as_long_and_twice_the_cores_half():
    once = seconds(SMALL)
    twice = seconds(replace(SMALL, documents=2_000_000))
    wide = seconds(replace(SMALL, cpu_machines=2 * SMALL.cpu_machines))
    for name, value in once.items():
        assert twice[name] == pytest.approx(2 * value)
        assert wide[name] == pytest.approx(value if name == "embed" else value / 2)


def test_money_is_hours_times_machines_times_price():
    for stage in stages_of(SMALL):
        assert stage.dollars == pytest.approx(stage.seconds / 3600 * stage.machines * stage.price)


def test_vectors_are_stored_at_four_bytes_a_number():
    assert storage_bytes(replace(SMALL, dimension=1_000))["embeddings"] == 1_000_000 * 4_080


def test_a_night_without_changes_embeds_nothing():
    idle, busy = (nightly(replace(SMALL, changed_share=share)) for share in (0.0, 1.0))
    assert busy[0] - idle[0] == pytest.approx(
        (seconds(SMALL)["embed"] + seconds(SMALL)["write"]) / 3600
    )


def test_the_table_says_whether_the_rate_was_measured(capsys):
    assert main(["--tokens-per-second", "5000"]) == 0
    assert "5,000 tokens/s, measured" in capsys.readouterr().out
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "ESTIMATED, not measured" in " ".join(out.split())
    assert "(bottleneck)" in out


@pytest.mark.parametrize("bad", [{"documents": 0}, {"utilization": 1.5}, {"cpu_machines": -1}])
def test_impossible_values_are_errors(bad):
    with pytest.raises(InputError):
        Sizing(**bad)


def test_bad_options_end_with_exit_code_2(capsys):
    assert main(["--utilization", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
