"""The one error root of the package."""


class PICacheError(ValueError):
    """What was asked cannot be done exactly; the message names the value and the remedy."""
