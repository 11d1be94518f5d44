"""One forward at a time with a cache, from whatever thread."""

import threading

from sparsity.errors import SparsityError

_CLAIM = threading.Lock()  # one for all, so that a cache can be copied and pickled


class OneAtATime:
    """Which thread is in a forward with a cache.

    Attributes:
        thread: its identifier; None for no thread.
    """

    def __init__(self) -> None:
        self.thread: int | None = None

    def enter(self, busy: bool) -> None:
        """Claim the cache for this thread; SparsityError while another thread has it.

        Args:
            busy: whether a forward is under way; a step that torch.compile traces does not `leave`.
        """
        me = threading.get_ident()
        with _CLAIM:
            if busy and self.thread not in (None, me):
                raise SparsityError(
                    "another thread is in a forward with this SparseCache, and one cache holds one "
                    "text at a time: make a cache for each thread with SparseCache(model, policy) "
                    "(they may share the model). If that forward was interrupted, call "
                    "cache.reset()"
                )
            self.thread = me

    def leave(self) -> None:
        """Give the cache back, if this thread has claimed it."""
        if self.thread == threading.get_ident():
            self.thread = None
