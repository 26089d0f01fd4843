"""What people decide about clusters holds through every later night, and is never lost silently."""

import json
import re
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nights import lineage_of, rows_of, text_of

from cluster.identity import Event, Identity
from pipelines.nightly.checks import NightFigures, run_checks
from pipelines.nightly.clusters import read_published_clusters
from pipelines.nightly.config import NightConfig
from pipelines.nightly.edits import broken_pairs
from pipelines.runtime.errors import InputError
from pipelines.store.compare import Side, compare
from pipelines.store.config import EditConfig
from pipelines.store.edits import edit_store, read_edits, require_no_conflict
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

pytestmark = pytest.mark.usefixtures("no_model")
DOCUMENTS = 200


@pytest.fixture
def edit(store):
    """Enters an edit; what the verb answers."""

    def enter(**flags):
        return edit_store(EditConfig(store=str(store), **flags)).data

    return enter


def texts_of(changed=()):
    """The corpus, some of its documents with another text of the same topic."""
    return {n: text_of(n, version=int(n in changed)) for n in range(DOCUMENTS)}


def table_of(store, name, number=None):
    version = Store.open(str(store)).version(number)
    return pq.read_table(pa.BufferReader(version.read(name))).to_pylist()


def names_of(store):
    return {row["cluster_id"]: row["name"] for row in table_of(store, "clusters.parquet")}


def statuses(store):
    rows = table_of(store, "edits.parquet")
    return {row["edit"]: row["status"] for row in rows}


def cluster_of(store, topic):
    rows = [row for row in rows_of(store).values() if row["text"].startswith(topic)]
    return {row["cluster_id"] for row in rows}


def check_sound(store):
    assert verify_store(Store.open(str(store))) == []


def test_a_name_holds_through_nights_and_says_what_it_replaced(edit, tonight, store):
    before = names_of(store)
    edit(name=(2, "Billing"), note="one team answers both", who="ann")
    assert not tonight(texts_of()).refusals  # nothing changed but the edit
    assert not tonight(texts_of({3, 4})).refusals
    assert names_of(store) == {**before, 2: "Billing"}
    (row,) = table_of(store, "edits.parquet")
    assert (row["status"], row["who"], row["overrode"]) == ("applied", "ann", before[2])
    assert row["since_version"] == 2
    assert (row["text"], row["note"]) == ("Billing", "one team answers both")
    assert not [e for e in lineage_of(store) if e["event"] == "renamed"]
    report = Store.open(str(store)).version().read("report.html").decode()
    assert "Billing" in report
    assert "by ann at" in report
    assert "one team answers both" in report
    assert "one team answers both" in str(edit_store(EditConfig(store=str(store))).rows)
    check_sound(store)


def test_an_undone_name_gives_way_to_the_keywords_again(edit, tonight, store):
    before = names_of(store)
    number = edit(name=(2, "Billing"))["number"]
    tonight(texts_of())
    edit(undo=number)
    tonight(texts_of())
    assert names_of(store) == before
    assert statuses(store) == {number: "undone"}
    result = tonight(texts_of())
    assert "nothing changed" in result.summary


def test_merged_clusters_stay_one_through_fits_until_the_merge_is_undone(edit, tonight, store):
    first, second = cluster_of(store, "a").pop(), cluster_of(store, "b").pop()
    number = edit(merge=(first, second))["number"]
    assert not tonight(texts_of()).refusals
    for changed in ({5, 6}, {0, 7, 8}):
        assert not tonight(texts_of(changed)).refusals
        assert cluster_of(store, "a") == cluster_of(store, "b") == {first}
        assert second not in names_of(store)
        assert len(names_of(store)) == 4
        check_sound(store)
    row = next(r for r in table_of(store, "clusters.parquet") if r["cluster_id"] == first)
    assert row["size"] == 80
    events = [(e["event"], e["cluster_id"], e["related_cluster_id"]) for e in lineage_of(store)]
    assert events[5:] == [("merged", second, first)]
    edit(undo=number)
    tonight(texts_of({0, 7, 8}))
    assert (cluster_of(store, "a"), cluster_of(store, "b")) == ({first}, {second})
    assert ("split", second) in {(e["event"], e["cluster_id"]) for e in lineage_of(store)}
    check_sound(store)


def page_of(store):
    """What the script of the published version's report draws, and the page."""
    page = Store.open(str(store)).version().read("report.html").decode()
    return json.loads(re.search(r'id="report-data">(.*?)</script>', page)[1]), page


def test_a_merged_cluster_counts_the_labels_of_all_its_parts(edit, tonight, store):
    a, b, c = (cluster_of(store, topic).pop() for topic in "abc")
    edit(merge=(a, b))
    edit(merge=(a, c))
    labels = {n: "first" if n % 5 == 0 else "other" for n in range(DOCUMENTS)}
    assert not tonight(texts_of({1, 2}), labels, accept=("score",)).refusals
    row = next(r for r in table_of(store, "clusters.parquet") if r["cluster_id"] == a)
    assert (row["size"], row["top_label"]) == (120, "other")
    assert row["top_label_share"] == pytest.approx(2 / 3)
    data, page = page_of(store)
    assert "200 documents into 3 clusters" in page
    assert data["numClusters"] == 3
    assert sorted(data["sizes"]) == [40, 40, 120]
    confusion = data["confusion"]
    assert len(set(confusion["clusters"])) == len(confusion["clusters"]) == 3
    place = confusion["clusters"].index(a)
    counts = [row[place] for row in confusion["counts"]]
    assert dict(zip(confusion["labels"], counts, strict=True)) == {"first": 40, "other": 80}


def test_a_merge_outlives_another_encoder(edit, tonight, store):
    first, second = cluster_of(store, "a").pop(), cluster_of(store, "b").pop()
    edit(merge=(first, second))
    tonight(texts_of())
    assert not tonight(texts_of(), prompt="none", accept=("encoder",)).refusals
    assert cluster_of(store, "a") == cluster_of(store, "b") == {first}
    check_sound(store)


def test_drift_does_not_count_documents_of_merged_clusters_as_moved(edit, tonight, store):
    edit(merge=(0, 1))
    tonight(texts_of())
    tonight(texts_of({3}))
    checks = json.loads(Store.open(str(store)).version().read("checks.json"))
    assert [c["value"] for c in checks if c["name"] == "drift"] == [0.0, pytest.approx(0, abs=0.1)]


def test_a_pinned_document_is_where_it_was_put(edit, tonight, store):
    home, other = cluster_of(store, "a").pop(), cluster_of(store, "b").pop()
    edit(pin=("0", other), note="asked for by the team")
    tonight(texts_of())
    tonight(texts_of({3}))
    row = rows_of(store)[0]
    assert row["cluster_id"] == other
    centroid = next(
        c["centroid"] for c in table_of(store, "centroids.parquet") if c["cluster_id"] == other
    )
    assert row["distance"] == pytest.approx(np.linalg.norm(row["embedding"] - centroid), rel=1e-4)
    (applied,) = table_of(store, "edits.parquet")
    assert applied["overrode"] == str(home)
    sizes = {c["cluster_id"]: c["size"] for c in table_of(store, "clusters.parquet")}
    assert (sizes[home], sizes[other]) == (39, 41)
    check_sound(store)
    texts = texts_of({3})
    del texts[0]
    tonight(texts)
    assert statuses(store) == {1: "waiting"}
    check_sound(store)


def test_a_cluster_reaches_no_farther_for_what_people_put_there(edit, tonight, store):
    def limits():
        known = read_published_clusters(str(store), None, 1.0)
        return dict(zip(known.ids.tolist(), known.limits.tolist(), strict=True))

    before, other = limits(), cluster_of(store, "b").pop()
    edit(pin=("0", other))
    tonight(texts_of())
    row = rows_of(store)[0]
    assert row["cluster_id"] == other
    assert row["distance"] > 1.5 * before[other]
    assert limits() == pytest.approx(before, rel=0.01)


def test_a_split_cluster_is_two_and_stays_so(edit, tonight, store):
    texts = texts_of() | {n: text_of(n, "a", 7) for n in range(0, DOCUMENTS, 10)}
    tonight(texts, max_drift=1.0)
    before = cluster_of(store, "a")
    assert len(before) == 1
    edit(split=before.copy().pop())
    assert not tonight(texts, accept=("score",)).refusals
    after = cluster_of(store, "a")
    assert len(after) == 2
    assert before < after
    assert tonight(texts | {1: text_of(1, version=3)}).refusals == []
    assert cluster_of(store, "a") == after
    assert statuses(store) == {1: "applied"}
    with pytest.raises(InputError, match="has been done"):
        edit(undo=1)
    check_sound(store)


def test_an_edit_of_a_cluster_that_died_is_kept_and_given_to_no_other(edit, tonight, store):
    gone = cluster_of(store, "e").pop()
    edit(name=(gone, "Old matters"))
    tonight(texts_of())
    texts = {n: text for n, text in texts_of().items() if not text.startswith("e")}
    tonight(texts, num_clusters="4", max_drift=1.0)
    assert gone not in names_of(store)
    assert statuses(store) == {1: "lost"}
    texts |= {n + 1000: text_of(n, "q") for n in range(40)}
    tonight(texts, num_clusters="5", max_drift=1.0)
    assert "Old matters" not in names_of(store).values()
    assert statuses(store) == {1: "lost"}


def test_a_pair_that_is_kept_apart_is_broken_where_one_went_into_the_other(edit, store):
    pair, other = edit(forbid=(1, 2)), edit(forbid=(3, 4))
    events = [Event("merged", 2, 1), Event("died", 3), Event("split", 4, 3)]
    identity = Identity(np.array([1], np.int32), np.array([1]), 5, [""], events)
    broken = broken_pairs(read_edits(str(store)), identity)
    assert [edit.number for edit in broken] == [pair["number"]] != [other["number"]]
    figures = {
        "counts": {"deleted": 0, "rejected": 0, "documents": 9},
        "documents_before": 9,
        "scores": {"num_clusters": 4, "imbalance": 1.0},
        "scores_before": None,
        "drift": None,
        "encoder_before": None,
    }
    told = NightFigures(**figures, broken_edits=[edit.describe() for edit in broken])
    (check,) = [c for c in run_checks(NightConfig(), told) if c.name == "edits"]
    assert check.refuses
    assert "edit 1 (forbid 1 2, by " in check.reason
    assert not [c for c in run_checks(NightConfig(), NightFigures(**figures)) if c.refuses]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"name": (1, "Billing")}, {"name": (1, "Invoices")}),
        ({"merge": (1, 2)}, {"forbid": (2, 1)}),
        ({"forbid": (1, 2)}, {"merge": (1, 2)}),
        ({"pin": ("3", 1)}, {"pin": ("03", 2)}),
        ({"split": 1}, {"merge": (1, 2)}),
        ({"merge": (1, 2)}, {"split": 2}),
        ({"merge": (1, 2)}, {"name": (2, "Part of another")}),
        ({"name": (2, "Billing")}, {"merge": (1, 2)}),
        ({"merge": (1, 2)}, {"merge": (3, 2)}),
    ],
)
def test_edits_that_contradict_each_other_are_refused_with_both_named(edit, store, one, other):
    edit(**one, who="ann")
    with pytest.raises(InputError, match=r"this edit .*by bob.* against edit 1 .*by ann.*--undo 1"):
        edit(**other, who="bob")
    assert len(read_edits(str(store))) == 1
    edit(undo=1)
    edit(**other, who="bob")


def test_clusters_that_are_kept_apart_are_not_merged_by_way_of_a_third(edit):
    edit(forbid=(1, 3))
    edit(merge=(1, 2))
    with pytest.raises(InputError, match=r"against edit 1 .*kept apart would be one"):
        edit(merge=(3, 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"name": (99, "Billing")}, "has no cluster 99; it has 0, 1, 2, 3, 4"),
        ({"pin": ("99999", 1)}, "has no document with id '99999'"),
        ({"pin": ("x", 1)}, "ids are integers"),
        ({"undo": 7}, "edit 7 does not hold"),
        ({"merge": (1, 1)}, "1 is given twice"),
        ({"merge": (1, 2), "split": 3}, "--merge and --split are given"),
        ({"name": (1, " ")}, "a name that is not empty"),
    ],
)
def test_what_an_edit_cannot_be_about_is_refused(edit, store, flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        edit(**flags)
    assert read_edits(str(store)) == []


def test_two_people_at_once_never_overwrite_each_other(edit, store):
    outcomes = []

    def enter(number):
        try:
            outcomes.append(edit(name=(number % 5, f"Name {number}"), who=f"person {number}"))
        except InputError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=enter, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    edits = read_edits(str(store))
    assert [e.number for e in edits] == [1, 2, 3, 4, 5]
    assert sorted(e.clusters[0] for e in edits) == [0, 1, 2, 3, 4]
    assert sum(isinstance(outcome, InputError) for outcome in outcomes) == 5


def test_an_edit_that_a_listing_missed_is_no_less_contradicted(edit, store, monkeypatch):
    edit(name=(0, "One"))
    edit(name=(1, "Two"))
    every = read_edits(str(store))
    answers = [every, every[1:], every]  # of the check beforehand, and of entering
    monkeypatch.setattr("pipelines.store.edits.read_edits", lambda _: answers.pop(0))
    monkeypatch.setattr("pipelines.store.edits.require_no_conflict", _after(1))
    with pytest.raises(InputError, match="has a name already"):
        edit(name=(0, "Other"))
    assert not answers


def _after(calls: int):
    """The check of conflicts, which lets the first ``calls`` pass."""
    left = [None] * calls

    def check(*given):
        if left:
            left.pop()
        else:
            require_no_conflict(*given)

    return check


def test_the_list_of_edits_says_what_became_of_each(edit, tonight, store):
    edit(name=(1, "Billing"), who="ann")
    tonight(texts_of())
    edit(note="look at cluster 3", who="bob")
    answer = edit_store(EditConfig(store=str(store)))
    assert [(d["action"], d["status"]) for d in answer.data] == [
        ("name", "applied"),
        ("note", "waiting"),
    ]


def test_a_rolled_back_night_takes_its_edits_up_again(edit, tonight, store):
    edit(name=(1, "Billing"))
    tonight(texts_of())
    opened = Store.open(str(store))
    with opened.take_lease("test") as lease:
        opened.rollback(lease)
    assert names_of(store)[1] != "Billing"
    tonight(texts_of())
    assert names_of(store)[1] == "Billing"


def change_table(version, name, change):
    rows = version.read_table(name)
    pq.write_table(pa.Table.from_pylist(change(rows.to_pylist()), rows.schema), version.path(name))


def change_entry(store, number, **values):
    path = store / "edits" / f"{number:08d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_values(chosen, **values):
    return lambda rows: [{**row, **values} if chosen(row) else row for row in rows]


def remove_undo(store, version):
    (store / "edits" / "00000006.json").unlink()


def move_tag(store, version):
    old = Store.open(str(store)).version(1)
    version.documents.tag("version-2", old.record.lance_version)


def publish_by_tag_alone(store, version):
    old = Store.open(str(store)).version(1)
    version.documents.tag("published", old.record.lance_version)


BREAKS = {
    "cluster 1 is not named as edit 1 says": lambda store, version: change_table(
        version, "clusters.parquet", with_values(lambda r: r["cluster_id"] == 1, name="other")
    ),
    "document '0' is not where edit 2 put it": lambda store, version: (
        change_entry(store, 2, clusters=[0])
        or change_table(
            version, "edits.parquet", with_values(lambda r: r["edit"] == 2, cluster_ids=[0])
        )
    ),
    "cluster 4 is not part of another, as edit 3 says": lambda store, version: change_table(
        version, "centroids.parquet", with_values(lambda r: r["part_id"] == 4, cluster_id=4)
    ),
    "clusters [1, 2] are one, though edit 4 keeps them apart": lambda store, version: change_table(
        version, "centroids.parquet", with_values(lambda r: r["part_id"] == 2, cluster_id=1)
    ),
    "edits.parquet lacks edit 4 of the journal": lambda store, version: change_table(
        version, "edits.parquet", lambda rows: [row for row in rows if row["edit"] != 4]
    ),
    "edits.parquet speaks of edit 1, of which the journal says otherwise": (
        lambda store, version: change_entry(store, 1, text="Another name")
    ),
    "edits.parquet speaks of edit 3, of which the journal says otherwise": (
        lambda store, version: (store / "edits" / "00000003.json").unlink()
    ),
    "edit 5 is undone, the journal says otherwise": remove_undo,
    "its lineage leads to other clusters than it has: [0]": lambda store, version: change_table(
        version, "lineage.parquet", lambda rows: rows[1:]
    ),
    "its lineage has cluster 0 born again": lambda store, version: change_table(
        version, "lineage.parquet", lambda rows: [rows[0], *rows]
    ),
    "tag 'version-2' names other documents than the version's record": move_tag,
    "version 1 is published, the last publication recorded is of 3": publish_by_tag_alone,
}


@pytest.mark.parametrize("problem", BREAKS)
def test_verify_finds_edits_lineage_and_tags_that_do_not_agree(edit, tonight, store, problem):
    edit(name=(1, "Billing"), who="ann")
    edit(pin=("0", 2))
    edit(merge=(3, 4))
    edit(forbid=(1, 2))
    number = edit(name=(0, "Nothing"))["number"]
    tonight(texts_of())
    edit(undo=number)
    tonight(texts_of())
    edit(note="for the next night")
    check_sound(store)
    BREAKS[problem](store, Store.open(str(store)).version())
    assert problem in "\n".join(verify_store(Store.open(str(store))))


def test_halves_of_a_split_can_be_split_again_and_merged(edit, tonight, store):
    texts = texts_of() | {n: text_of(n, "a", 7) for n in range(0, DOCUMENTS, 10)}
    quiet = {"max_drift": 1.0, "accept": ("score",)}
    tonight(texts, **quiet)
    (first,) = cluster_of(store, "a")
    edit(split=first)
    assert not tonight(texts, **quiet).refusals
    edit(split=first)
    assert not tonight(texts, **quiet).refusals
    halves = cluster_of(store, "a")
    assert len(halves) == 3
    second, third = sorted(halves - {first})
    assert [row["says"] for row in table_of(store, "edits.parquet")] == [
        f"cluster {second} came out of it", f"cluster {third} came out of it",
    ]  # fmt: skip
    edit(merge=(first, second))
    edit(merge=(first, third))
    with pytest.raises(InputError, match=r"against edit 3 .*merged and split"):
        edit(split=second)
    assert not tonight(texts, **quiet).refusals
    assert cluster_of(store, "a") == {first}
    check_sound(store)


def test_two_splits_of_a_cluster_are_two_after_a_rollback_too(edit, tonight, store):
    texts = texts_of() | {n: text_of(n, "a", 7) for n in range(0, DOCUMENTS, 10)}
    quiet = {"max_drift": 1.0, "accept": ("score",)}
    (first,) = cluster_of(store, "a")
    for _ in range(2):
        edit(split=first)
        tonight(texts, **quiet)
    opened = Store.open(str(store))
    with opened.take_lease("test") as lease:
        opened.rollback(lease)
        opened.rollback(lease)
    for waiting in (1, 0):
        tonight(texts, **quiet)
        assert list(statuses(store).values()).count("waiting") == waiting
    assert len(cluster_of(store, "a")) == 3
    check_sound(store)


def test_a_split_on_the_night_of_another_encoder_is_done_the_next_night(edit, tonight, store):
    (first,) = cluster_of(store, "a")
    edit(split=first)
    for status, clusters in (("waiting", 1), ("applied", 2), ("applied", 2)):
        result = tonight(texts_of(), prompt="none", accept=("encoder", "score"), max_drift=1.0)
        assert statuses(store) == {1: status}
        assert len(cluster_of(store, "a")) == clusters
    assert "nothing changed" in result.summary
    check_sound(store)


def reasons_of(store, old, new):
    opened = Store.open(str(store))
    sides = Side.of(opened.version(old)), Side.of(opened.version(new))
    moved = compare(*sides, sample=0, seed=0)["moved"]
    return {why: count for why, count in moved["reasons"].items() if count}


def test_a_comparison_tells_what_moved_by_edits_from_what_moved_by_itself(edit, tonight, store):
    texts, quiet = texts_of(), {"max_drift": 1.0, "accept": ("score",)}
    homes = {topic: cluster_of(store, topic).pop() for topic in "abcde"}
    one, two, three = homes["a"], homes["b"], homes["c"]
    numbers = [edit(merge=(one, two))["number"], edit(merge=(three, one))["number"]]
    tonight(texts, **quiet)
    assert reasons_of(store, 1, 2) == reasons_of(store, 2, 1) == {"edit": 80}  # by way of a third
    for number in numbers:
        edit(undo=number)
    numbers = [edit(pin=("3", homes["e"]))["number"], edit(split=three)["number"]]
    tonight(texts, **quiet)
    assert cluster_of(store, "b") == {two}  # each of the merged is as it was, but the one split
    check_sound(store)
    came_out = len([r for r in rows_of(store).values() if r["cluster_id"] not in homes.values()])
    assert reasons_of(store, 1, 3) == reasons_of(store, 3, 1) == {"edit": 1 + came_out}
    edit(undo=numbers[0])
    tonight(texts, **quiet)
    texts[3] = text_of(3, "a", 5)
    tonight(texts, **quiet)
    assert reasons_of(store, 4, 5) == {"text": 1}  # of a pin that holds in neither


def test_merged_clusters_keep_a_name_of_which_words_still_fit(edit, tonight, store):
    homes = {topic: cluster_of(store, topic).pop() for topic in "ab"}
    for first, second in ("ab", "ba"):
        number = edit(merge=(homes[first], homes[second]))["number"]
        for changed in ({}, {5, 6}, {0, 7, 8}):
            tonight(texts_of(changed))
            assert names_of(store)[homes[first]] == f"{first * 3}, topic{first}"
        edit(undo=number)
        tonight(texts_of())
    assert not [event for event in lineage_of(store) if event["event"] == "renamed"]
    check_sound(store)


def test_pinned_documents_do_not_count_as_moved(edit, tonight, store):
    home, other = cluster_of(store, "a").pop(), cluster_of(store, "b").pop()
    pinned = range(0, 175, 5)  # of 40
    numbers = [edit(pin=(str(number), other))["number"] for number in pinned]
    for changed in ({}, {3}, {4}):
        assert not tonight(texts_of(changed), max_drift=0.1).refusals
        rows = rows_of(store)
        assert {rows[number]["cluster_id"] for number in pinned} == {other}
        assert {rows[number]["cluster_id"] for number in range(175, 200, 5)} == {home}
        check_sound(store)
    checks = Store.open(str(store)).version().read_json("checks.json")
    assert next(check["value"] for check in checks if check["name"] == "drift") == 0
    for number in numbers:
        edit(undo=number)
    assert not tonight(texts_of({4}), max_drift=0.1).refusals
    assert cluster_of(store, "a") == {home}
    assert not [event for event in lineage_of(store) if event["version"] > 1]
