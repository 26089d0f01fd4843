"""The one exception of this package that speaks to users."""


class InputError(ValueError):
    """Bad input or options: one clear line for the user, exit code 2, nothing lost.

    The message says what was found, what was required and what to do.
    """

    exit_code = 2
