"""One forward at a time with a cache, whatever threads they come from."""

import threading

from sparsity.errors import SparsityError

_CLAIM = threading.Lock()  # one for all, so that a cache can be copied and pickled


class OneAtATime:
    """Who is in a forward with a cache.

    thread: the identifier of the thread that is, None for nobody.
    """

    def __init__(self) -> None:
        self.thread: int | None = None

    def enter(self) -> None:
        """Claim the cache for this thread; SparsityError while another thread has it."""
        me = threading.get_ident()
        with _CLAIM:
            if self.thread not in (None, me):
                raise SparsityError(
                    "another thread is in a forward with this SparseCache, and one cache holds one "
                    "text at a time: make a cache for each thread with SparseCache(model, policy) "
                    "(they may share the model). If that forward was interrupted, call "
                    "cache.reset()"
                )
            self.thread = me

    def leave(self) -> None:
        """Give the cache up, where this thread has it."""
        if self.thread == threading.get_ident():
            self.thread = None
