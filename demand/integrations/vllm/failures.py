"""What can go wrong with a call to a server, and when it is worth another attempt."""

import math
import random
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import final

from demand.arguments import whole_number
from demand.errors import DemandError
from demand.seconds import check_seconds


class CallError(DemandError):
    """A call got no answer: it was refused, ran out of attempts, or was cancelled.

    The message says how many attempts were made and what the last one saw.
    """


class StreamBrokenError(CallError):
    """A stream broke after part of it had been handed over, and could not be continued."""


@final
class AttemptError(Exception):
    """One attempt at a call failed. The controller tries again, or reports it as a `CallError`.

    Args:
        reason: what was seen.
        again: whether another attempt has a chance.
        shed: whether the server is shedding load (429, 503), which concerns every call to it.
        retry_after_seconds: how long the server asked clients to wait (Retry-After); `None` if it
            did not ask.
    """

    def __init__(
        self,
        reason: str,
        *,
        again: bool,
        shed: bool = False,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.again = again
        self.shed = shed
        self.retry_after_seconds = retry_after_seconds


@final
@dataclass(frozen=True)
class Retry:
    """How often a failed call is tried again, and after how long: bounded exponential backoff.

    The n-th retry waits between half and all of first_seconds * 2**(n - 1), drawn at random so
    that clients do not come back all at once, or as long as the server's Retry-After asks, if that
    is longer. A Retry-After beyond `longest_seconds` is not shortened: the call fails instead.

    Args:
        attempts: how many are made at most, the first included.
        first_seconds: longest delay before the first retry.
        longest_seconds: longest delay before any retry.

    Raises:
        DemandError: attempts that are no whole number from 1 on, or delays that are no finite
            seconds or out of order.
    """

    attempts: int = 5
    first_seconds: float = 0.5
    longest_seconds: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "attempts", whole_number("attempts", self.attempts, least=1))
        for name in ("first_seconds", "longest_seconds"):
            object.__setattr__(self, name, check_seconds(name, getattr(self, name)))
        if not 0.0 <= self.first_seconds <= self.longest_seconds:
            raise DemandError(
                f"first_seconds is {self.first_seconds} and longest_seconds is "
                f"{self.longest_seconds}; expected 0 <= first_seconds <= longest_seconds"
            )

    def delay_seconds(
        self, failure: AttemptError, attempts: int, rng: random.Random
    ) -> float | None:
        """Seconds to wait before the next attempt; `None` if the call is not tried again.

        Args:
            failure: of the last attempt.
            attempts: how many have been made.
            rng: draws the delay.
        """
        asked = failure.retry_after_seconds or 0.0
        if not failure.again or attempts >= self.attempts or asked > self.longest_seconds:
            return None
        return max(asked, self._backoff_seconds(attempts, rng))

    def pause_seconds(self, failure: AttemptError, in_a_row: int, rng: random.Random) -> float:
        """Seconds for which nothing is sent to a server that sheds load, `longest_seconds` at most.

        It concerns calls that have not failed. So it does not depend on how often the refused one
        was tried, nor on whether it is tried again.

        Args:
            failure: by which the server shed load.
            in_a_row: how often it has, the last time included, without having taken a call since.
            rng: draws the backoff.
        """
        asked = min(failure.retry_after_seconds or 0.0, self.longest_seconds)
        return max(asked, self._backoff_seconds(in_a_row, rng))

    def _backoff_seconds(self, count: int, rng: random.Random) -> float:
        doublings = min(count - 1, 1000)  # beyond that a float is none
        longest = min(self.first_seconds * 2.0**doublings, self.longest_seconds)
        return longest * rng.uniform(0.5, 1.0)


@final
class Shedding:
    """When a server that sheds load is sent calls again.

    Calls that were on their way when it began to shed load are likely to be refused as well. They
    tell nothing new: a pause grows only by a refusal of what was sent after it, so that a burst of
    refusals is one. As soon as the server takes a call that was sent after, all is forgotten.

    Args:
        retry: how long it is left alone.
        rng: draws the backoff.

    Attributes:
        until: second before which nothing is sent.
    """

    def __init__(self, retry: Retry, rng: random.Random) -> None:
        self.until = -math.inf
        self._retry = retry
        self._rng = rng
        self._in_a_row = 0
        self._since = -math.inf

    def refused(self, failure: AttemptError, sent: float, now: float) -> None:
        """Note that the server shed the load of a call.

        Args:
            failure: what it said.
            sent: second at which the call was sent.
            now: second of its answer.
        """
        if sent >= self._since:
            self._in_a_row += 1
            self._since = now
            pause = self._retry.pause_seconds(failure, self._in_a_row, self._rng)
        else:
            pause = min(failure.retry_after_seconds or 0.0, self._retry.longest_seconds)
        self.until = max(self.until, now + pause)

    def taken(self, sent: float) -> None:
        """Note that the server answered a call that was sent at second `sent`."""
        if sent >= self._since:
            self._in_a_row = 0


def retry_after_seconds(header: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date (RFC 9110).

    Args:
        header: its value; `None` if the response had none.
        now: seconds since the epoch.

    Returns:
        Seconds from 0 on, or `None` if there is no header or it is neither.
    """
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(parsedate_to_datetime(header).timestamp() - now, 0.0)
    except ValueError:
        return None
