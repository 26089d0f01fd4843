"""The exceptions that speak to users: one clear line, no traceback."""


class _OneLine:
    """Ray appends lines of advice of its own to the message of what a worker raises."""

    def __str__(self) -> str:
        """The message without them."""
        return super().__str__().partition("\nFailed to ")[0]


class InputError(_OneLine, ValueError):
    """Bad input or options: one clear line for the user, exit code 2, nothing lost.

    The message says what was found, what was required and what to do.
    """

    exit_code = 2


class StorageError(_OneLine, OSError):
    """A disk that is full or a store that does not answer: one clear line, exit code 1.

    What was written stays; the same command goes on from there.
    """

    exit_code = 1


def find_told_error(error: BaseException | None) -> BaseException | None:
    """The exception with an ``exit_code`` in a chain of causes (Ray wraps what workers raise)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        cause = getattr(error, "cause", None)  # Ray's own, whose text is a whole traceback
        if hasattr(error, "exit_code") and not hasattr(cause, "exit_code"):
            return error
        error = cause or error.__cause__
    return None
