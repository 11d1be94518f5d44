"""The one error root of the package."""


class DemandError(ValueError):
    """Raised for every refused input: names the value, what was expected and the remedy."""
