"""The contrastive loss over all ranks, and its gradient with few texts in memory at a time.

Shapes: n pairs on this rank, N pairs on all ranks together, M hard negatives on all ranks, d the
length of a vector. Vectors need not be normalised; similarity is the cosine.

The loss is InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) with in-batch negatives. Each
rank takes its own rows against the columns of all ranks, gathered with gradient, and divides by
N: summed over ranks, losses and gradients are exactly those of one process with the whole batch.

A teacher's vectors, where there are any, add how little the texts' similarities agree with its
own: one minus the correlation of a text's similarities to all others, as Huang et al. 2022
(arXiv:2205.10536) match a teacher's answers, whatever their scale and mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.runtime.threads import side_by_side
from pipelines.training.config import _LOWEST_TEMPERATURE, LossSettings

TEACHING = 20.0
"""Weight of how little the texts' similarities agree with a teacher's."""


@dataclass(frozen=True)
class PairKeys:
    """Which texts of a batch are the same, so that none is pushed away from itself.

    Two pairs that share any of their keys are no negatives of each other.
    """

    pairs: Tensor
    """int64 (n, k): hashes of each pair's texts, and of its document."""
    negatives: Tensor | None = None
    """int64 (m, l): keys of the hard negatives' texts, and of their near copies."""
    positives: Tensor | None = None
    """int64 (n, j): keys of the near copies of each positive alone, for hard negatives."""


class ContrastiveLoss(nn.Module):
    """InfoNCE over the pairs of all ranks, with its temperature."""

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        self.settings = settings
        self.log_temperature = nn.Parameter(
            torch.tensor(settings.temperature).log(), requires_grad=settings.learn_temperature
        )

    @property
    def temperature(self) -> Tensor:
        """What cosines are divided by, a scalar."""
        return self.log_temperature.exp().clamp(min=_LOWEST_TEMPERATURE)

    def forward(
        self,
        anchors: Tensor,
        positives: Tensor,
        keys: PairKeys,
        negatives: Tensor | None = None,
        taught: Tensor | None = None,
    ) -> Tensor:
        """This rank's share of the mean loss over all pairs, a scalar.

        Arguments are those of :meth:`per_pair`.
        """
        everyone = sum(row_counts(len(anchors), anchors.device))
        return self.per_pair(anchors, positives, keys, negatives, taught).sum() / everyone

    def per_pair(
        self,
        anchors: Tensor,
        positives: Tensor,
        keys: PairKeys,
        negatives: Tensor | None = None,
        taught: Tensor | None = None,
    ) -> Tensor:
        """The loss of each of this rank's pairs, float (n,).

        Args:
            anchors: float (n, d), this rank's.
            positives: float (n, d), in the same order.
            keys: what marks equal texts.
            negatives: float (m, d), this rank's hard negatives; on all ranks or on none.
            taught: float (2n, t), a teacher's vectors of the anchors, then of the positives; on
                all ranks or on none.
        """
        counts = row_counts(len(anchors), anchors.device)
        all_anchors, all_positives = gather_rows(anchors), gather_rows(positives)
        offset = sum(counts[: _rank()])
        own = torch.arange(offset, offset + len(anchors), device=anchors.device)
        forbidden = shared_keys(keys.pairs, gather_rows(keys.pairs))
        forbidden[torch.arange(len(own), device=own.device), own] = False
        columns, forbidden_columns = all_positives, forbidden
        if negatives is not None:
            assert keys.negatives is not None
            columns = torch.cat([all_positives, gather_rows(negatives)])
            known = [keys.pairs] if keys.positives is None else [keys.pairs, keys.positives]
            same = shared_keys(torch.cat(known, dim=1), gather_rows(keys.negatives))
            forbidden_columns = torch.cat([forbidden, same], dim=1)
        losses = []
        for length in sorted({*self.settings.dimensions, anchors.shape[1]}):
            loss = self._direction(anchors, columns, own, forbidden_columns, length)
            if self.settings.both_directions:
                back = self._direction(positives, all_anchors, own, forbidden, length)
                loss = (loss + back) / 2
            if taught is not None:
                texts = torch.cat([anchors[:, :length], positives[:, :length]])
                loss = loss + TEACHING * (1 - agreement(texts, taught))
            losses.append(loss)
        return torch.stack(losses).mean(dim=0)

    def _direction(
        self, rows: Tensor, columns: Tensor, own: Tensor, forbidden: Tensor, length: int
    ) -> Tensor:
        """Cross-entropy (n,) of rows (n, d) against columns (c, d); ``own`` int64 (n,)."""
        rows = nn.functional.normalize(rows[:, :length].float(), dim=-1)
        columns = nn.functional.normalize(columns[:, :length].float(), dim=-1)
        cosines = rows @ columns.T
        if self.settings.margin:
            cosines = cosines - self.settings.margin * nn.functional.one_hot(own, len(columns))
        logits = (cosines / self.temperature).masked_fill(forbidden, -torch.inf)
        return nn.functional.cross_entropy(logits, own, reduction="none")


def agreement(texts: Tensor, taught: Tensor) -> Tensor:
    """How far two encoders agree what each of this rank's pairs is like, -1 to 1, float (n,).

    The correlation of a text's cosines to all other texts of all ranks' pairs by one encoder with
    those by the other, the mean of a pair's two texts.

    Args:
        texts: float (2n, d), this rank's anchors, then its positives.
        taught: float (2n, t), the same texts by the other encoder.
    """
    mine = row_counts(len(texts), texts.device)
    own = sum(mine[: _rank()]) + torch.arange(len(texts), device=texts.device)
    others = own[:, None] != torch.arange(sum(mine), device=texts.device)
    found, wanted = (_centred_cosines(vectors, others) for vectors in (texts, taught))
    correlation = nn.functional.cosine_similarity(found, wanted, dim=1)
    return correlation.view(2, len(texts) // 2).mean(dim=0)  # a rank may have no pair


def _centred_cosines(vectors: Tensor, others: Tensor) -> Tensor:
    """Cosines (n, c - 1) of this rank's rows to the others of all ranks' rows, less their mean."""
    rows = nn.functional.normalize(vectors.float(), dim=-1)
    found = (rows @ gather_rows(rows).T)[others]
    cosines = found.view(len(rows), max(0, others.shape[1] - 1))
    return cosines - cosines.mean(dim=1, keepdim=True)


def shared_keys(rows: Tensor, columns: Tensor) -> Tensor:
    """Bool (n, c): whether row i and column j have any key in common.

    Args:
        rows: int64 (n, k).
        columns: int64 (c, l).
    """
    shared = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    for row_key in rows.T:
        for column_key in columns.T:
            shared |= row_key[:, None] == column_key[None, :]
    return shared


def gather_rows(local: Tensor) -> Tensor:
    """The rows of all ranks, in the order of ranks, with gradient to the rank they came from.

    Ranks may hold different numbers of rows. In one process this is ``local`` itself.
    """
    if _world_size() == 1:
        return local
    counts = row_counts(len(local), local.device)
    return _GatherRows.apply(local, counts)


def row_counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank holds."""
    if _world_size() == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(_world_size())]
    dist.all_gather(counts, torch.tensor([rows], device=device))
    return [int(count) for count in counts]


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward sums the gradients that all ranks have for a rank's rows."""

    @staticmethod
    def forward(context: Any, local: Tensor, counts: list[int]) -> Tensor:
        context.counts = counts
        padded = local.new_zeros(max(counts), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        start = sum(context.counts[: _rank()])
        return total[start : start + context.counts[_rank()]], None


def backward_in_parts(
    embed: Callable[[list[int]], Tensor],
    batches: Sequence[list[int]],
    objective: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    *,
    held: int,
    at_once: int = 1,
) -> Tensor:
    """Gradients of ``objective(embed(all texts))`` with only some texts' activations in memory.

    Gradient caching (Gao et al. 2021, arXiv:2101.06983): embed everything without activations,
    take the objective's gradient for the vectors alone, then embed again part by part and send
    each part's gradient down. The last ``held`` parts keep their activations from the start and
    are embedded only once. ``embed`` must give the same vectors both times.

    Args:
        embed: vectors (len(indices), d) of the texts of these indices.
        batches: indices of the texts, each of 0, 1, … in exactly one batch.
        objective: a scalar of all vectors in the order of their indices.
        parameters: what the vectors are differentiated by.
        held: how many of the last batches are in memory at once; 0 holds ``at_once``.
        at_once: how many batches are worked on side by side, in threads. Gradients are added up
            in the same order whatever it is.

    Returns:
        The objective, detached. Gradients are added to the parameters' ``grad``.
    """
    first, at_once = len(batches) - held, min(at_once, len(batches))
    parts = list(side_by_side(torch.no_grad()(embed), batches[:first], at_once))
    kept = list(side_by_side(embed, batches[first:], at_once))
    order = torch.tensor([index for batch in batches for index in batch])
    vectors = torch.cat([*parts, *(part.detach() for part in kept)])[order.argsort()]
    vectors.requires_grad_()
    value = objective(vectors)
    value.backward()
    rows = vectors.grad
    assert rows is not None

    def held_gradients(place: int) -> tuple[Tensor | None, ...]:
        batch, part = batches[first + place], kept[place]
        return torch.autograd.grad(part, parameters, rows[batch], allow_unused=True)

    def gradients(batch: list[int]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(embed(batch), parameters, rows[batch], allow_unused=True)

    add_gradients(parameters, side_by_side(held_gradients, range(held), at_once))
    add_gradients(parameters, side_by_side(gradients, batches[:first], at_once))
    return value.detach()


def add_gradients(
    parameters: Sequence[nn.Parameter], parts: Iterable[Sequence[Tensor | None]]
) -> None:
    """Add each part's gradients to the parameters'; None is no gradient."""
    for part in parts:
        for parameter, gradient in zip(parameters, part, strict=True):
            if gradient is not None:
                parameter.grad = (
                    gradient if parameter.grad is None else parameter.grad.add_(gradient)
                )


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up gradients over ranks, as one flat tensor; parameters without one count as zero.

    Each rank's loss is already its share of the mean, so the sum is the whole batch's gradient.
    """
    if _world_size() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def sum_over_ranks(value: Tensor) -> float:
    """A scalar added up over ranks."""
    total = value.detach().clone()
    if _world_size() > 1:
        dist.all_reduce(total)
    return float(total)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world_size() > 1 else 0
