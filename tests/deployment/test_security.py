"""What comes from outside runs no code, leaves no folder and shows no terminal a trick."""

import ast
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import trivial_workers
from tiny_models import tiny_adapter, tiny_tokenizer

from pipelines.embedding import job as embed
from pipelines.embedding.config import EmbedConfig
from pipelines.embedding.job import embed_corpus
from pipelines.encoder.adapters import repeats_a_repeat
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.sources import fetch_adapter, fetch_model, is_confined
from pipelines.runtime.command import print_config
from pipelines.runtime.errors import InputError
from pipelines.runtime.logs import show_controls
from pipelines.runtime.run_record import RunRecord

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipelines", "cluster", "jobs")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.load"}
FORBIDDEN_CALLS |= {"os.system", "os.popen", "pickle.load", "pickle.loads"}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text())
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_runs_what_it_reads(path):
    for name, call in calls(path):
        assert name not in FORBIDDEN_CALLS, f"{path}:{call.lineno}: {name}"
        for keyword in call.keywords:
            always = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            dangerous = keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and always
            assert not dangerous, f"{path}:{call.lineno}: {keyword.arg}=True"


def test_every_load_of_a_model_says_whether_its_code_is_trusted():
    loads = [
        (path, call)
        for path in SOURCES
        for name, call in calls(path)
        if name.endswith(".from_pretrained") and not name.startswith("peft.")
    ]
    assert len(loads) >= 6
    for path, call in loads:
        given = {keyword.arg for keyword in call.keywords}
        assert "trust_remote_code" in given, f"{path}:{call.lineno}"


@pytest.fixture
def model_with_code(tmp_path, monkeypatch):
    """A folder whose Python code leaves a mark where it is run."""
    folder, mark = tmp_path / "model", tmp_path / "code-was-run"
    folder.mkdir()
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig\n"
    (folder / "configuration_own.py").write_text(code + "class OwnConfig(LlamaConfig): pass\n")
    auto = {"AutoConfig": "configuration_own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    tiny_tokenizer().save_pretrained(folder)
    empty = b"{}"
    (folder / "model.safetensors").write_bytes(len(empty).to_bytes(8, "little") + empty)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    return folder, mark


def test_a_models_code_is_not_run(model_with_code):
    folder, mark = model_with_code
    with pytest.raises(InputError, match="pass --trust-remote-code if you trust"):
        describe_encoder(EncoderConfig(model=str(folder)))
    assert not mark.exists()


def test_a_models_code_is_run_when_asked_for(model_with_code):
    folder, mark = model_with_code
    describe_encoder(EncoderConfig(model=str(folder), trust_remote_code=True))
    assert mark.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_that_code_is_run_is_said_in_the_output(capsys, trusted):
    print_config("embed_corpus", {"model": "someone/model", "trust_remote_code": trusted})
    said = "Python code that comes with someone/model is run" in capsys.readouterr().out
    assert said == trusted


@pytest.fixture
def adapter(tmp_path, tiny_model_folder):
    return tiny_adapter(tmp_path / "adapter", tiny_model_folder)


def change_settings(adapter: Path, **settings) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_an_ordinary_adapter_passes(adapter):
    assert fetch_adapter(str(adapter)).folder == adapter


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"megatron_config": {"x": 1}, "megatron_core": "evil"}, "names a Python module to import"),
        ({"peft_type": "IA3"}, "LORA is required"),
        ({"target_modules": "(.+)+_proj"}, "may take for ever"),
        ({"target_modules": "a" * 5000}, "may take for ever"),
        ({"rank_pattern": {"(a*)*b": 4}}, "may take for ever"),
        ({"alpha_pattern": {"((q|k)+)*": 4}}, "may take for ever"),
    ],
)
def test_an_adapter_whose_settings_could_run_or_stall_is_refused(adapter, settings, message):
    change_settings(adapter, **settings)
    with pytest.raises(InputError, match=message):
        fetch_adapter(str(adapter))


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, "\x00"])
def test_an_adapter_with_other_settings_than_json_is_refused(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        fetch_adapter(str(adapter))


def test_an_adapter_of_pickled_weights_is_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        fetch_adapter(str(adapter))


def test_a_models_index_cannot_name_files_elsewhere(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", tmp_path / "other.safetensors")
    index = {"weight_map": {"a": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="a file outside its folder"):
        fetch_model(str(folder))


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{"])
def test_a_models_index_of_another_form_is_refused(tmp_path, tiny_model_folder, content):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="fetch it again"):
        fetch_model(str(folder))


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", "..\\x", "."])
def test_names_that_leave_a_folder_are_seen(name):
    assert not is_confined(name)


def test_a_remote_models_files_stay_in_their_copy(
    s3_server, tiny_model_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    s3_server.create_bucket(Bucket="shoal-models")
    for path in tiny_model_folder.iterdir():
        s3_server.upload_file(str(path), "shoal-models", f"good/{path.name}")
        s3_server.upload_file(str(path), "shoal-models", f"bad/{path.name}")
    s3_server.put_object(Bucket="shoal-models", Key="good/1_Pooling/config.json", Body=b"{}")
    s3_server.put_object(Bucket="shoal-models", Key="bad/../../../escaped.json", Body=b"{}")
    good = fetch_model("s3://shoal-models/good").folder
    assert (good / "1_Pooling" / "config.json").is_file()
    with pytest.raises((InputError, OSError)):
        fetch_model("s3://shoal-models/bad")
    found = {path.name for path in tmp_path.rglob("*")}
    assert "escaped.json" not in found


HOSTILE = [
    "</script><script>alert(1)</script>",
    "\x1b]0;taken\x07\x1b[2J",
    "=cmd|' /C calc'!A0",
    "{{ 7 * 7 }} {% raw %} ${HOME} $(reboot) `reboot`",
    "null \x00 byte",
    "\u202eright to left\u202c \ufeff",
    "[red]markup[/red] [/]",
    "../../../../etc/passwd",
]


def test_a_hostile_corpus_is_data(local_ray, tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(embed, "WORKERS", trivial_workers.WORKERS)
    corpus = tmp_path / "in" / "a corpus; reboot \x1b[2J.jsonl"
    corpus.parent.mkdir()
    rows = [json.dumps({"id": text, "text": f"{text} {n}"}) for n, text in enumerate(HOSTILE)]
    rows += ["[" * 200_000, '{"text": ' * 50_000, '{"id": {"a": 1}, "text": "x"}', "\ud800"]
    corpus.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
    config = EmbedConfig(
        corpus=str(corpus.parent),
        output=str(tmp_path / "out"),
        model=str(tiny_model_folder),
    )
    with RunRecord(config.output, "embed_corpus", {}) as record:
        embed_corpus(config, record)
    assert record.counts["embedded"] == len(HOSTILE)
    assert record.counts["rejected"] == 4
    table = pq.read_table(tmp_path / "out" / "embeddings")
    assert sorted(table["id"].to_pylist()) == sorted(HOSTILE)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"embeddings", "rejected", "encoder.json", "run.json"}


def test_control_characters_reach_no_terminal():
    assert show_controls("a\x1b[2Jb\tc\nd\x9b") == "a\\x1b[2Jb\tc\nd\\x9b"


@pytest.mark.parametrize("pattern", ["(a+)+", "((q|k)+)*", "(x(ab)*y){3}", r"(?:[^.]+)+_proj"])
def test_patterns_that_repeat_a_repeat_are_seen(pattern):
    assert repeats_a_repeat(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r".*\.(q|k)_proj", r"model\.layers\.[0-9]+\..*", r"(a[+*]b)+", r"(a\+)+", "all-linear", "()*"],
)
def test_ordinary_patterns_pass(pattern):
    assert not repeats_a_repeat(pattern)
