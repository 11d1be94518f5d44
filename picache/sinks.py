"""Tokens to compile a chunk behind, so that its own first tokens do not become attention sinks."""

from dataclasses import dataclass
from typing import Literal

from picache.arguments import whole_number
from picache.errors import PICacheError


@dataclass(frozen=True)
class DummySinks:
    """Compile chunks behind `count` dummy tokens, whose KV is left out of the prompt.

    The dummies absorb the attention that the chunk's first tokens would, as in EPIC's LegoLink-0
    (arXiv 2410.15332, section 4). A BOS that the chunk begins with is replaced by the dummies.

    Args:
        count: how many dummies; the paper has 4 (its code three and the BOS).
        token: token id of the dummy; None for the BOS.

    Raises:
        PICacheError: when `count` is not a whole number of at least 1, or `token` no token id.
    """

    count: int = 4
    token: int | None = None

    def __post_init__(self) -> None:
        count = whole_number(
            "DummySinks needs a whole number of at least 1 dummies",
            self.count,
            least=1,
            remedy="sinks='drop' compiles a chunk behind its own BOS alone",
        )
        object.__setattr__(self, "count", count)
        if self.token is not None:
            needs = "DummySinks needs the id of a token, a whole number of at least 0"
            object.__setattr__(self, "token", whole_number(needs, self.token, least=0))


@dataclass(frozen=True)
class SharedPrefix:
    """Compile chunks behind a real text, such as the system prompt, whose KV is left out of them.

    A prefix that all chunks share absorbs attention just as the beginning of the prompt will, as in
    APE (arXiv 2502.05431, section 3).

    Args:
        text: the prefix, as text or as a tuple of token ids; with a BOS if the prompt has one.

    Raises:
        PICacheError: when `text` is neither.
    """

    text: str | tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.text, str | tuple):
            raise PICacheError(
                f"SharedPrefix needs a text or a tuple of token ids, got {self.text!r}"
            )


Sinks = Literal["drop", "keep"] | DummySinks | SharedPrefix
"""What `PIC` compiles chunks behind; see its argument `sinks`."""
