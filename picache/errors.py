"""The errors of the package: one root class, and the two that a caller can recover from."""


class PICacheError(ValueError):
    """What was asked cannot be done exactly; the message says why, and what to do instead."""


class StoreFull(PICacheError):  # noqa: N818 - the root names the kind
    """The store has no room for a chunk: it is too large, or the others are pinned or in use."""


class CorruptChunk(PICacheError):  # noqa: N818 - the root names the kind
    """A stored chunk was found damaged and was removed from the store; compile it again."""
