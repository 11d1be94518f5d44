"""KV blocks of an engine: who holds them, and who loses them when they run out."""

from typing import final

from demand.engine.model import Engine
from demand.engine.tasks import Request


@final
class Blocks:
    """The pool of blocks, rule 3 of `Engine`.

    Attributes:
        free: blocks that nobody holds.
        peak: most blocks held at once.
        moved: blocks copied to or from the host since the last step.
        swapped: blocks copied to or from the host.
        prefilled_again: tokens whose KV was lost, to be computed again.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.free = engine.blocks
        self.peak = 0
        self.moved = 0
        self.swapped = 0
        self.prefilled_again = 0
        self._holders: dict[Request, None] = {}

    def hold(self, request: Request, tokens: int) -> bool:
        """Give `request` the blocks that its KV takes with `tokens` more tokens, or refuse."""
        needed = self.engine.blocks_for(request.computed + tokens) - request.blocks
        if needed > self.free and not self._make_room(request, needed):
            return False
        if needed:
            self._holders[request] = None
            self.free -= needed
            request.blocks += needed
        if request.swapped:
            self.moved += request.swapped
            request.swapped = 0
        return True

    def grow(self, requests: list[Request]) -> None:
        """Give each of `requests` the blocks that its KV takes now; they must be free."""
        for request in requests:
            needed = self.engine.blocks_for(request.computed) - request.blocks
            if needed:
                request.blocks += needed
                self.free -= needed

    def count(self) -> None:
        """Take note of the blocks held at the end of a step."""
        self.peak = max(self.peak, self.engine.blocks - self.free)

    def release(self, request: Request) -> None:
        """Take back the blocks of a request that is over."""
        self.free += request.blocks
        request.blocks = 0
        del self._holders[request]

    def trim(self) -> None:
        """Let no more than `max_requests` requests hold KV, where the engine does not pause."""
        if self.engine.preemption in ("recompute", "swap"):
            while len(self._holders) > self.engine.max_requests:
                self._take(max(self._holders, key=_place))

    def take_moved(self) -> int:
        """Blocks copied since the last call."""
        moved, self.moved = self.moved, 0
        self.swapped += moved
        return moved

    def _make_room(self, request: Request, needed: int) -> bool:
        """Free blocks of requests that come after `request`, last first, if that is enough."""
        later = [holder for holder in self._holders if holder.place > request.place]
        if self.free + sum(holder.blocks for holder in later) < needed:
            return False
        later.sort(key=_place)
        while self.free < needed:
            self._take(later.pop())
        return True

    def _take(self, victim: Request) -> None:
        self.free += victim.blocks
        if self.engine.preemption == "swap":
            victim.swapped = victim.blocks
            self.moved += victim.blocks
        else:
            self.prefilled_again += victim.computed
            victim.computed = 0
        victim.blocks = 0
        del self._holders[victim]


def _place(request: Request) -> tuple[object, int]:
    return request.place
