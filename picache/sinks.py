"""What a chunk is compiled behind, so that its first tokens need not become attention sinks."""

from dataclasses import dataclass
from typing import Literal

from picache.arguments import whole_number
from picache.errors import PICacheError


@dataclass(frozen=True)
class DummySinks:
    """Compile chunks behind `count` dummy tokens, whose KV is left out of the prompt.

    EPIC's LegoLink-0 (arXiv 2410.15332, section 4): the dummies absorb the attention that a
    chunk's first tokens would. A BOS that the chunk begins with is one of the dummies.

    Args:
        count: dummies; the paper has 4 (its code three and the BOS).
        token: id of the dummy; None for the BOS.

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
    """Compile chunks behind a real text, such as the system prompt, left out of the middle.

    As APE does (arXiv 2502.05431, section 3): a prefix that chunks share absorbs the sink as the
    prompt's own beginning will.

    Args:
        text: what to compile behind: text, or token ids, a BOS included if the prompt has one.
    """

    text: str | tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.text, str | tuple):
            raise PICacheError(
                f"SharedPrefix needs a text or a tuple of token ids, got {self.text!r}"
            )


Sinks = Literal["drop", "keep"] | DummySinks | SharedPrefix
