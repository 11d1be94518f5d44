"""The errors of the package: one root, and the kinds a caller recovers from."""


class PICacheError(ValueError):
    """What was asked cannot be done exactly; the message names the value and the remedy."""


class StoreFull(PICacheError):  # noqa: N818 - the root names the kind
    """A chunk has no room in the store: what is there is pinned, in use, or the chunk too large."""


class CorruptChunk(PICacheError):  # noqa: N818 - the root names the kind
    """A stored chunk failed its check; it is gone from the store, so compile it again."""
