"""The right to write to a store: one holder at a time, renewed while it lives."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class LeaseHeldError(RuntimeError):
    """Another run holds the lease: come back later."""

    exit_code = 75


class LeaseLostError(RuntimeError):
    """The lease was taken over, or could not be renewed in time: stop writing."""

    exit_code = 75


class StaleWriterError(RuntimeError):
    """Another writer has changed the store since this one looked."""

    exit_code = 75


class Lease:
    """The right to write to a store; leaving the context gives it back."""

    def check(self) -> None:
        """Raise :class:`LeaseLostError` unless this is still the holder."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        raise NotImplementedError
