import pytest

from pipelines.runtime import listing
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import write_bytes
from pipelines.runtime.listing import match_files, refuse_own_output

FILES = (
    "a.txt",
    "b.txt/part-0.txt",
    "b.txt/_SUCCESS",
    "b.txt/.part-0.txt.crc",
    "c/a.txt",
    "c/d/a.txt",
    "_work/a.txt",
    "[c]/e.txt",
    "x.lance/data/1.lance",
    "x.lance/_versions/1.manifest",
)
GLOBS = [
    ("*.txt", ["a.txt", "b.txt/part-0.txt"]),
    ("?.txt", ["a.txt", "b.txt/part-0.txt"]),
    ("*/a.txt", ["c/a.txt"]),
    ("**/a.txt", ["a.txt", "c/a.txt", "c/d/a.txt"]),
    ("c/**/*.txt", ["c/a.txt", "c/d/a.txt"]),
    ("c/**", ["c/a.txt", "c/d/a.txt"]),
    ("**/d/*", ["c/d/a.txt"]),
    ("[ab].txt", ["a.txt", "b.txt/part-0.txt"]),
    ("[!a].txt", ["b.txt/part-0.txt"]),
    ("[c]", ["[c]/e.txt"]),
    ("[c]/*.txt", ["[c]/e.txt"]),
    ("_*/*.txt", ["_work/a.txt"]),
    ("b.txt", ["b.txt/part-0.txt"]),
    ("c", ["c/a.txt", "c/d/a.txt"]),
    ("x.lance", ["x.lance"]),
    ("*.lance", ["x.lance"]),
    ("**/*.lance", ["x.lance"]),
    ("a.*/*", []),
    ("*.csv", []),
]


@pytest.mark.parametrize(("pattern", "matches"), GLOBS)
def test_a_glob_is_the_shells_and_searches_folders_that_it_matches(tmp_path, pattern, matches):
    for name in FILES:
        write_bytes(str(tmp_path / name), b"x")
    infos = match_files(f"{tmp_path}/{pattern}", datasets=(".lance",))
    assert [info.path.removeprefix(f"{tmp_path}/") for info in infos] == matches


def test_globs_on_s3_are_those_of_a_local_disk(s3_server):
    s3_server.create_bucket(Bucket="shoal-globs")
    for name in FILES:
        s3_server.put_object(Bucket="shoal-globs", Key=f"top/{name}", Body=b"x")
    for pattern, matches in GLOBS:
        infos = match_files(f"s3://shoal-globs/top/{pattern}", datasets=(".lance",))
        paths = [info.path.removeprefix("shoal-globs/top/") for info in infos]
        assert paths == matches, pattern


def test_a_folder_that_may_not_be_read_is_told_in_one_line(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(listing, "_search", refused)
    with pytest.raises(InputError, match=r"cannot list .*Permission denied"):
        match_files(str(tmp_path))


@pytest.mark.parametrize(
    ("corpus", "output", "refused"),
    [
        ("data", "data/run", True),
        ("data", "link/run", True),
        ("link", "data/run", True),
        ("data/**/*.txt", "data/run", True),
        ("data/**/*.txt", "link/run", True),
        ("link/2024/**/*.txt", "data/2024/store", True),
        ("data/*", "data/run", True),
        ("data/*/*.txt", "data/run", True),
        ("data/*.txt", "data/run.txt", True),
        ("data/*.txt", "data/run", False),
        ("data/2024/*.txt", "data/run", False),
        ("data/[0-9]*/*.txt", "data/run", False),
        ("data/*/2024/*.txt", "data/run", False),
        ("data/a.txt", "data/run", False),
        ("data", "data-run", False),
        ("data/2024", "data", False),
        ("run", "run/clusters", False),
    ],
)
def test_an_output_that_would_be_read_again_is_refused(
    tmp_path, monkeypatch, corpus, output, refused
):
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.txt", "data/2024/b.txt", "run/embeddings/part-0.parquet"):
        write_bytes(name, b"x")
    (tmp_path / "link").symlink_to("data")
    for written in ("output", "store"):
        if not refused:
            refuse_own_output({"corpus": corpus, written: output})
            continue
        for source in ("corpus", "embeddings", "pairs", "against"):
            with pytest.raises(InputError, match=rf"--{written} .* lies within --{source}"):
                refuse_own_output({source: corpus, written: output})
    assert not (tmp_path / "data" / "run").exists()
