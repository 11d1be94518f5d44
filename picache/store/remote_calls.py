"""Calls to a remote file system that end in time, are tried again, and stop when it is dead."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from picache.errors import PICacheError

SECONDS_PER_BYTE = 1 / 2**20  # what moves may take its time: 1 MiB a second
MOST_RETRIES = 10
_TRIPS_AT = 2  # calls of one function that fail one after the other, with all their retries
_PERMANENT = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError)

T = TypeVar("T")


class TierResting(OSError):  # noqa: N818 - it names what is the case
    """A remote tier that failed is not asked for a while."""


@dataclass(frozen=True)
class RemoteLimits:
    """How long a remote tier is waited for.

    Attributes:
        timeout: seconds a call may take, and one more for every MiB it moves.
        retries: how often a call that failed is made again, 0 to 10, each after twice the wait.
        pause: seconds a tier is left alone after two calls in a row of one function failed with all
            their retries.

    Raises:
        PICacheError: when one of them is out of its range.
    """

    timeout: float = 30.0
    retries: int = 2
    pause: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout < float("inf"):
            raise PICacheError(
                f"remote_timeout must be a positive number of seconds, got {self.timeout!r}"
            )
        if type(self.retries) is not int or not 0 <= self.retries <= MOST_RETRIES:
            raise PICacheError(
                f"remote_retries must be a whole number of 0 to {MOST_RETRIES}, got "
                f"{self.retries!r}"
            )
        if not 0 <= self.pause < float("inf"):
            raise PICacheError(
                f"remote_pause must be a number of seconds of at least 0, got {self.pause!r}"
            )


class _Answer(Generic[T]):
    """What a call gave, once a thread of its own is done with it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._done = threading.Event()
        self._error: Exception | None = None
        self._value: T

        def work() -> None:
            try:
                self._value = call()
            except Exception as error:
                self._error = error
            self._done.set()

        threading.Thread(target=work, name="picache-remote", daemon=True).start()

    def within(self, seconds: float) -> T:
        """The value, or the error it ended with; TimeoutError when it does not come in time."""
        if not self._done.wait(seconds):
            raise TimeoutError(f"no answer within {seconds:.1f} seconds")
        if self._error is not None:
            raise self._error
        return self._value


class RemoteCalls:
    """Makes calls, each in a thread that is left behind when it does not end.

    A file system that hangs can thus hold nobody up for longer than `timeout * (retries + 1)` and
    the waits between; after two such calls in a row, `TierResting` is raised at once for `pause`
    seconds. The first call after them shows whether the tier is back.
    """

    def __init__(self, limits: RemoteLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._failed: Counter[str] = Counter()  # calls in a row by their function
        self._resting_until = 0.0

    def __call__(self, call: Callable[..., T], *args: Any, nbytes: int = 0, **named: Any) -> T:
        """What `call` gives; raises what it raised last, or TimeoutError.

        Args:
            call: of the file system.
            args: for it.
            nbytes: that it moves.
            named: for it.
        """
        limits = self._limits
        self._refuse_while_resting()
        name = call.__name__
        for attempt in range(limits.retries + 1):
            if attempt:
                time.sleep(min(0.1 * 2 ** (attempt - 1), limits.timeout))
            try:
                value = _Answer(partial(call, *args, **named)).within(
                    limits.timeout + nbytes * SECONDS_PER_BYTE
                )
            except _PERMANENT:  # an answer, though not the wanted one
                self._note(name, failed=False)
                raise
            except Exception as error:
                last = error
            else:
                self._note(name, failed=False)
                return value
        self._note(name, failed=True)
        raise last

    def _note(self, name: str, failed: bool) -> None:
        """What is written may arrive while what is read does not: each is counted alone."""
        with self._lock:
            self._failed[name] = self._failed[name] + 1 if failed else 0
            if self._failed[name] >= _TRIPS_AT:
                self._resting_until = time.monotonic() + self._limits.pause

    def _refuse_while_resting(self) -> None:
        with self._lock:
            if time.monotonic() < self._resting_until:
                name, times = self._failed.most_common(1)[0]
                raise TierResting(
                    f"its {name} failed {times} times in a row, and it is not asked for "
                    f"{self._limits.pause:g} seconds"
                )
