"""The one error of the package."""


class SparsityError(ValueError):
    """Something was asked that cannot be done right.

    The message names the value that was given, what was expected, and what to do instead.
    """
