"""Which server calls go to: its URL, the key, and how long to wait."""

import re
from dataclasses import dataclass, field
from typing import final
from urllib.parse import SplitResult, urlsplit

from demand.errors import DemandError
from demand.seconds import one_of_seconds


@final
@dataclass(frozen=True)
class Server:
    """A server that speaks the OpenAI protocol: where it is, the key, and how long to wait for it.

    Redirects are not followed, and TLS certificates are verified.

    Args:
        url: base URL of the API, such as "http://127.0.0.1:8000/v1".
        api_key: sent as a bearer token; never printed, logged or put into an error. `None` sends
            no key, whatever the environment has.
        connect_seconds: longest time until a connection is established.
        silence_seconds: longest wait for the next bytes of an answer, also for its first ones, so
            that it has to cover the time a request spends in the server's own queue.
        attempt_seconds: longest duration of one attempt in all.

    Raises:
        DemandError: a URL that is not plain http or https, a key that is not printable ASCII, or
            a time that is no positive number of seconds.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    connect_seconds: float = 5.0
    silence_seconds: float = 120.0
    attempt_seconds: float = 1800.0

    def __post_init__(self) -> None:
        # `urlsplit` would drop white space unseen. A key or a URL may be secret: neither is quoted.
        if not isinstance(self.url, str) or not re.fullmatch(r"[^\s\x00-\x1f\x7f]+", self.url):
            raise DemandError(
                "the url is no string, is empty, or contains white space or a control character; "
                "expected something like http://127.0.0.1:8000/v1"
            )
        try:
            parts = urlsplit(self.url)
        except ValueError:
            raise DemandError(
                "the host of the url cannot be read; expected something like "
                "http://127.0.0.1:8000/v1 or http://[::1]:8000/v1"
            ) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DemandError(
                f"url begins with {parts.scheme!r} and names host {parts.hostname!r}; expected "
                "something like http://127.0.0.1:8000/v1"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise DemandError(
                f"the url to {parts.hostname} carries a user, a query or a fragment; give the "
                "base URL alone, and the key as api_key"
            )
        if not _has_port_or_none(parts):
            raise DemandError(
                f"the url to {parts.hostname} has a port that is no number from 1 to 65535; "
                "give the port that the server listens on"
            )
        if self.api_key is not None and not _is_printable_ascii(self.api_key):
            raise DemandError(
                "api_key is empty, or has a space, a line break or a character outside of ASCII; "
                "expected printable ASCII alone: strip what was read from a file, or give None to "
                "send no key"
            )
        for name in ("connect_seconds", "silence_seconds", "attempt_seconds"):
            seconds = one_of_seconds(name, getattr(self, name))
            if not seconds > 0.0:
                raise DemandError(f"{name} is {seconds}; expected a positive number")
            object.__setattr__(self, name, seconds)


def _is_printable_ascii(key: object) -> bool:
    return isinstance(key, str) and re.fullmatch(r"[!-~]+", key) is not None


def _has_port_or_none(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False
