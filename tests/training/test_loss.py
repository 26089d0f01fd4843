import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pipelines.runtime.errors import InputError
from pipelines.training.config import LossSettings
from pipelines.training.lean import RowDropout, RowSeeds, row_mask
from pipelines.training.loss import (
    TEACHING,
    ContrastiveLoss,
    PairKeys,
    agreement,
    backward_in_parts,
    gather_rows,
    shared_keys,
    sum_gradients,
    sum_over_ranks,
)

PAIRS = 6
LENGTHS = (5, 7, 4, 7, 6, 3, 5, 5, 7, 2, 6, 4, 3, 6, 5, 4)
OWNERS = (0, 2, 2, 5)
"""Which pairs the texts after anchors and positives are hard negatives of; most have none."""
NEGATIVE_KEYS = (500, 104, 502, 503)
"""The second hard negative is the fifth pair's positive."""


class Tower(nn.Module):
    """Tokens (n, t) to vectors (n, d) through a dropout, a stand-in for a tuned LLM."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.rows = RowSeeds()
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.Sequential(
            RowDropout(0.2, 0, self.rows), nn.Linear(16, 16), nn.Tanh(),
            RowDropout(0.2, 1, self.rows), nn.Linear(16, 8),
        )  # fmt: skip

    def forward(self, token_ids, seeds):
        longest = max(map(len, token_ids))
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in token_ids])
        mask = torch.tensor([[i < len(ids) for i in range(longest)] for ids in token_ids])
        self.rows.set(seeds)
        states = self.layers(self.embedding(padded))
        return (states * mask[..., None]).sum(dim=1)


def texts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(50, (n,), generator=generator).tolist() for n in LENGTHS]


def keys(start, stop):
    own = torch.arange(start, stop)
    pairs = torch.stack([own, 100 + own], dim=1)
    pairs[own == 4] = torch.tensor([1, 104])  # the fifth pair shares a text with the second
    return PairKeys(pairs)


def taught_vectors():
    return torch.randn(2 * PAIRS, 5, generator=torch.Generator().manual_seed(9))


def gradients(start, stop, batches, held, settings, hard=False, at_once=1, taught=False):
    """Loss and gradients of the pairs start to stop, on whatever ranks there are."""
    tower = Tower()
    loss = ContrastiveLoss(settings)
    token_ids = texts()
    own = [place for place, owner in enumerate(OWNERS) if hard and start <= owner < stop]
    rows = [*range(start, stop), *range(PAIRS + start, PAIRS + stop)]
    rows += [2 * PAIRS + place for place in own]
    known = keys(start, stop)
    if hard:
        own_keys = torch.tensor([[NEGATIVE_KEYS[place]] for place in own], dtype=torch.long)
        own_keys = own_keys.view(len(own), 1)
        known = PairKeys(known.pairs, own_keys)

    def embed(indices):
        chosen = [rows[index] for index in indices]
        return tower([token_ids[row] for row in chosen], [1000 + row for row in chosen])

    def objective(vectors):
        pairs = stop - start
        anchors, positives, negatives = vectors.split([pairs, pairs, len(own)])
        wanted = taught_vectors()[rows[: 2 * pairs]] if taught else None
        return loss(anchors, positives, known, negatives if hard else None, wanted)

    parameters = [p for p in (*tower.parameters(), *loss.parameters()) if p.requires_grad]
    value = backward_in_parts(embed, batches, objective, parameters, held=held, at_once=at_once)
    sum_gradients(parameters)
    return sum_over_ranks(value), [p.grad.clone() for p in parameters]


def plain(settings, hard=False, taught=False):
    """The whole batch in one process, written down again from the definition."""
    tower = Tower()
    count = 2 * PAIRS + len(OWNERS) * hard
    vectors = tower(texts()[:count], [1000 + row for row in range(count)])
    log_temperature = torch.tensor(settings.temperature).log().requires_grad_()
    total = 0.0
    lengths = settings.dimensions or (8,)
    for length in lengths:
        unit = nn.functional.normalize(vectors[:, :length], dim=-1)
        a, p, negatives = unit[:PAIRS], unit[PAIRS : 2 * PAIRS], unit[2 * PAIRS :]
        for x, y in ((a, p), (p, a)) if settings.both_directions else ((a, p),):
            for i in range(PAIRS):
                logits = []
                for j in range(PAIRS):
                    if {i, j} == {1, 4}:
                        continue
                    cosine = x[i] @ y[j] - (settings.margin if i == j else 0)
                    logits.append(cosine / log_temperature.exp())
                for place, negative in enumerate(negatives if y is p else ()):
                    if (i, place) != (4, 1):
                        logits.append(x[i] @ negative / log_temperature.exp())
                own = i if i < 4 else (i - 1 if i == 4 else i)
                own = len([j for j in range(i) if {i, j} != {1, 4}])
                total = total - torch.stack(logits).log_softmax(dim=0)[own]
    total = total / PAIRS / len(lengths) / (2 if settings.both_directions else 1)
    for length in lengths if taught else ():
        unit = nn.functional.normalize(vectors[: 2 * PAIRS, :length], dim=-1)
        wanted = nn.functional.normalize(taught_vectors(), dim=-1)
        for i in range(2 * PAIRS):
            others = [j for j in range(2 * PAIRS) if j != i]
            ours, theirs = (torch.stack([x[i] @ x[j] for j in others]) for x in (unit, wanted))
            correlation = torch.corrcoef(torch.stack([ours, theirs]))[0, 1]
            total = total + TEACHING * (1 - correlation) / (2 * PAIRS) / len(lengths)
    total.backward()
    found = [p.grad.clone() for p in tower.parameters()]
    if settings.learn_temperature:
        found.append(log_temperature.grad)
    return float(total), found


SETTINGS = {
    "plain": LossSettings(),
    "one direction": LossSettings(temperature=0.2, both_directions=False),
    "learned temperature, margin": LossSettings(learn_temperature=True, margin=0.1),
    "matryoshka": LossSettings(temperature=0.1, dimensions=(4, 8)),
}
SPLITS = {
    "whole": ([list(range(12))], 1),
    "micro-batches": ([[1, 3, 8, 4], [0, 2, 5], [10, 6, 7, 11, 9]], 0),
    "micro-batches, two held": ([[1, 3, 8, 4], [0, 2, 5], [10, 6, 7, 11, 9]], 2),
}
HARD_SPLITS = {
    "whole": ([list(range(16))], 1),
    "micro-batches, one held": ([[1, 3, 13, 8, 4], [0, 15, 2, 5, 12], [10, 6, 7, 14, 11, 9]], 1),
}


def assert_equal(found, expected):
    assert math.isclose(found[0], expected[0], rel_tol=1e-4)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert torch.linalg.norm(mine - theirs) <= 1e-4 * torch.linalg.norm(theirs)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", SETTINGS)
def test_one_rank_equals_the_definition_however_the_batch_is_split(name, split):
    batches, held = SPLITS[split]
    found = gradients(0, PAIRS, batches, held, SETTINGS[name])
    assert_equal(found, plain(SETTINGS[name]))
    threads = torch.get_num_threads()
    beside = gradients(0, PAIRS, batches, held, SETTINGS[name], at_once=3)
    assert beside[0] == found[0] and all(map(torch.equal, beside[1], found[1]))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("split", HARD_SPLITS)
@pytest.mark.parametrize("name", SETTINGS)
def test_hard_negatives_of_some_pairs_equal_the_definition(name, split):
    found = gradients(0, PAIRS, *HARD_SPLITS[split], SETTINGS[name], hard=True)
    assert_equal(found, plain(SETTINGS[name], hard=True))


@pytest.mark.parametrize("name", ["plain", "matryoshka"])
def test_a_teachers_similarities_equal_the_definition(name):
    found = gradients(0, PAIRS, *SPLITS["micro-batches, two held"], SETTINGS[name], taught=True)
    assert_equal(found, plain(SETTINGS[name], taught=True))


def test_agreement_heeds_neither_scale_nor_mean_of_similarities():
    wanted = taught_vectors()
    shifted = torch.cat([wanted, torch.ones(len(wanted), 1) * wanted.norm(dim=1, keepdim=True)], 1)
    assert torch.allclose(agreement(shifted, wanted), torch.ones(PAIRS), atol=1e-5)
    assert agreement(torch.randn(2 * PAIRS, 3), wanted).abs().max() < 0.9


TWO_RANKS = ("plain", "learned temperature, margin", "matryoshka")


def _work(rank, world_size, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    start, stop = ((0, 4), (4, 6))[rank]  # ranks may differ in their number of pairs
    hard = [[0, 9, 5, 2], [1, 3, 8, 4, 6, 7, 10]] if rank == 0 else [[3, 1, 4], [0, 2]]
    value, found = gradients(start, stop, hard, rank, SETTINGS["plain"], hard=True)
    torch.save([value, *found], f"{results}/hard-{rank}.pt")
    batches = [[0, 5, 2], [1, 3, 4, 6, 7]] if rank == 0 else [[3, 1], [0, 2]]
    value, found = gradients(start, stop, batches, rank, SETTINGS["plain"], taught=True)
    torch.save([value, *found], f"{results}/taught-{rank}.pt")
    for name in TWO_RANKS:
        value, found = gradients(start, stop, batches, rank, SETTINGS[name])
        torch.save([value, *found], f"{results}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_micro_batches_equal_one_process(tmp_path, free_port):
    mp.spawn(_work, (2, free_port, tmp_path), nprocs=2)
    for name in TWO_RANKS:
        expected = plain(SETTINGS[name])
        for rank in range(2):
            value, *found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert_equal((value, found), expected)
    for name in ("hard", "taught"):
        expected = plain(SETTINGS["plain"], **{name: True})
        for rank in range(2):
            value, *found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert_equal((value, found), expected)


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_hard_negatives_are_columns_except_a_pairs_own_texts():
    torch.manual_seed(0)
    anchors, positives, negatives = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 4)
    pair_keys = torch.tensor([[0, 10], [1, 11], [2, 12]])
    loss = ContrastiveLoss(LossSettings(temperature=1.0, both_directions=False))
    found = loss(anchors, positives, PairKeys(pair_keys, torch.tensor([[12], [99]])), negatives)
    a, p, n = (nn.functional.normalize(x, dim=-1) for x in (anchors, positives, negatives))
    logits = torch.cat([a @ p.T, a @ n.T], dim=1)
    logits[2, 3] = -torch.inf  # the first hard negative is the third pair's positive
    assert torch.allclose(found, nn.functional.cross_entropy(logits, torch.arange(3)))


def test_pairs_of_the_same_text_do_not_repel_each_other():
    vectors = torch.eye(4)[:2].repeat(2, 1).requires_grad_()
    same = PairKeys(torch.tensor([[7, 7], [7, 7]]))
    ContrastiveLoss(LossSettings())(vectors[:2], vectors[2:], same).backward()
    assert torch.count_nonzero(vectors.grad) == 0


def test_shared_keys_compares_any_with_any():
    found = shared_keys(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 9], [5, 6], [4, 3]]))
    assert found.tolist() == [[True, False, False], [False, False, True]]


def test_a_rank_without_a_pair_has_losses_of_none():
    nothing = torch.zeros(0, 4)
    assert agreement(nothing, torch.zeros(0, 3)).shape == (0,)
    keys, loss = PairKeys(torch.zeros(0, 3, dtype=torch.long)), ContrastiveLoss(LossSettings())
    assert loss.per_pair(nothing, nothing, keys, taught=torch.zeros(0, 3)).shape == (0,)


def test_gathering_in_one_process_changes_nothing():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows


def test_mask_is_a_rows_own_and_has_the_asked_rate():
    seeds = torch.tensor([5, 6, 7])
    mask = row_mask(seeds, 2, 40, 300, 0.1)
    assert abs(1 - mask.float().mean() - 0.1) < 0.01
    assert torch.equal(mask[:, :17], row_mask(seeds, 2, 17, 300, 0.1))
    assert torch.equal(mask[1:2], row_mask(torch.tensor([6]), 2, 40, 300, 0.1))
    assert not torch.equal(mask, row_mask(seeds, 3, 40, 300, 0.1))
    dropped = (~mask).float().mean(dim=(0, 1))
    assert dropped.max() < 0.3  # no feature is dropped for every token


def test_mask_of_two_rows_and_of_two_features_are_independent():
    mask = row_mask(torch.arange(200), 0, 4, 64, 0.5).float().reshape(200, -1)
    correlation = torch.corrcoef(mask).fill_diagonal_(0).abs()
    assert correlation.mean() < 0.08
    assert torch.corrcoef(mask.T).fill_diagonal_(0).abs().max() < 0.35


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"margin": 1.5}, "margin is 1.5"),
        ({"dimensions": (0,)}, "dimensions"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LossSettings(**settings)
