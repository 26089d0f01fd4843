"""Which documents are near-duplicates: the search misses none, and who is removed has a keeper."""

import numpy as np
import pytest

from cluster import duplicates
from cluster.duplicates import (
    MOST_PAIRS,
    Cells,
    PairSearch,
    Rows,
    Shadows,
    decide,
    exact_cosines,
    find_duplicates,
    no_decisions,
    to_units,
)


def greedy(vectors, similarity):
    """The rule, one document after the other."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    kept, keepers = [], np.full(len(vectors), -1)
    for row in range(len(vectors)):
        if not lengths[row]:
            continue
        for other in kept:
            cosine = wide[row] @ wide[other] / (lengths[row] * lengths[other])
            if np.float32(cosine) >= np.float32(similarity):
                keepers[row] = other
                break
        else:
            kept.append(row)
    return keepers


def clumps(n, dimension, seed=0, spread=0.3):
    random = np.random.default_rng(seed)
    centres = random.standard_normal((n // 4, dimension))
    drawn = centres[random.integers(0, len(centres), n)]
    return (drawn + spread * random.standard_normal((n, dimension))).astype(np.float32)


def test_of_a_chain_the_ends_are_kept_and_the_middle_names_one_of_them():
    angles = np.deg2rad([0, 10, 20])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = find_duplicates(vectors, 0.978)
    assert found.keepers.tolist() == [-1, 0, -1]
    assert found.similarities[1] == pytest.approx(np.cos(np.deg2rad(10)), abs=1e-6)


@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("early", [1, 50, 512])
def test_decisions_are_those_of_one_document_after_the_other(similarity, early, monkeypatch):
    monkeypatch.setattr(duplicates, "_EARLY", early)
    vectors = clumps(600, 12, spread=0.15)
    vectors[37], vectors[411], vectors[590] = 0, vectors[3] * 2, vectors[580]
    found = find_duplicates(vectors, similarity)
    assert found.keepers.tolist() == greedy(vectors, similarity).tolist()
    assert not found.undecided.any()


def test_more_alike_than_are_looked_at_in_a_round_take_more_rounds(monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 2)
    monkeypatch.setattr(duplicates, "_EARLY", 2)
    vectors = clumps(300, 4, spread=0.2)
    found = find_duplicates(vectors, 0.9)
    assert found.keepers.tolist() == greedy(vectors, 0.9).tolist()
    rounds = []
    monkeypatch.setattr(duplicates, "decide", lambda *given: rounds.append(1) or decide(*given))
    find_duplicates(vectors, 0.9)
    assert len(rounds) > 3


def test_what_repeats_only_removed_ones_beyond_the_listed_stays_undecided():
    pairs = duplicates.Pairs(
        np.array([1, 2]), np.array([0, 1]), np.ones(2, np.float32), np.array([2])
    )
    found = decide(pairs, no_decisions(3))
    assert found.keepers.tolist() == [-1, 0, -1]
    assert found.undecided.tolist() == [False, False, True]


@pytest.mark.parametrize("similarity", [0.8, 0.95, 0.99])
def test_every_pair_meets_in_a_cell(similarity):
    random = np.random.default_rng(3)
    left = to_units(random.standard_normal((2_000, 5)).astype(np.float32))
    noise = random.standard_normal((2_000, 5)) * np.sqrt(2 - 2 * similarity) / 5
    right = to_units((left + noise).astype(np.float32))
    similar = exact_cosines(left, right) >= similarity
    assert similar.sum() > 500
    cells = Cells(to_units(random.standard_normal((50, 5)).astype(np.float32)), similarity)
    (home, rows, visited), (other, other_rows, other_visited) = (
        cells.visits(left),
        cells.visits(right),
    )
    visits = set(zip(rows.tolist(), visited.tolist(), strict=True))
    returned = set(zip(other_rows.tolist(), other_visited.tolist(), strict=True))
    meet = [
        home[i] == other[i] or (i, other[i]) in visits or (i, home[i]) in returned
        for i in np.flatnonzero(similar)
    ]
    assert all(meet)
    assert (home[similar] != other[similar]).any()


def test_all_alike_leave_one():
    found = find_duplicates(np.ones((3_000, 8), np.float32) * np.arange(1, 3_001)[:, None], 1.0)
    assert found.keepers.tolist() == [-1] + [0] * 2_999
    assert (found.similarities[1:] == 1).all()


def test_with_another_set_only_pairs_across_the_two_count():
    units = to_units(np.array([[1, 0], [1, 0.01], [1, 0.02], [0, 1], [0.01, 1]], np.float32))
    search = PairSearch(0.99, fixed=2)
    search.add_members(Rows(units, Shadows.of(units).bounds(units), np.arange(5)))
    found = decide(search.pairs(), no_decisions(5))
    assert found.keepers.tolist() == [-1, -1, 0, -1, -1]


def test_similarity_at_the_threshold_does_not_depend_on_the_company():
    random = np.random.default_rng(5)
    units = to_units(random.standard_normal((200, 96)).astype(np.float32))
    threshold = float(exact_cosines(units[:1], units[1:2])[0])
    alone = find_duplicates(units[:2], threshold)
    among = find_duplicates(units, threshold)
    assert alone.keepers[1] == 0
    assert among.keepers[1] == 0
    assert alone.similarities[1] == among.similarities[1]


@pytest.mark.parametrize("fall", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("dimension", [1, 5, 384])
def test_bounds_are_never_below_the_cosine(dimension, fall):
    random = np.random.default_rng(7)
    scale = (1 + np.arange(dimension)) ** -fall
    units = to_units((random.standard_normal((400, dimension)) * scale + scale).astype(np.float32))
    units[200:] = to_units(units[:200] + np.float32(1e-3) * units[200:])
    bounds = Shadows.of(units[:100]).bounds(units)
    wide = units.astype(np.float64)
    assert (bounds @ bounds.T >= wide @ wide.T - 1e-6 * np.sqrt(dimension)).all()


def test_pairs_are_those_of_all_products_whether_few_or_most_are_near():
    random = np.random.default_rng(9)
    scale = (1 + np.arange(96)) ** -0.5
    spread = random.standard_normal((700, 96)) * scale
    crowd = 3 * scale + 0.4 * random.standard_normal((300, 96)) * scale
    units = to_units(np.concatenate([spread, spread[:90] + 0.1 * spread[90:180], crowd])
                     .astype(np.float32))  # fmt: skip
    every = Rows(units, Shadows.of(units).bounds(units), np.arange(len(units)))
    search = PairSearch(0.93)
    search.add_members(every)
    found = search.pairs()
    near = np.tril(units.astype(np.float64) @ units.T.astype(np.float64) >= 0.93, -1)
    later, earlier = np.nonzero(near)
    assert len(later) > 5_000  # of the crowd
    place = np.arange(len(later)) - np.searchsorted(later, later)
    first = place < MOST_PAIRS
    assert found.later.tolist() == later[first].tolist()
    assert found.earlier.tolist() == earlier[first].tolist()
    assert set(found.overfull.tolist()) == set(later[~first].tolist())
