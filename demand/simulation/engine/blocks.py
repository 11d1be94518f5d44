"""KV blocks of an engine: who holds them, and who loses them when they run out."""

from typing import final

from demand.simulation.engine.engine import Engine
from demand.simulation.engine.job_on_engine import Calls, JobOnEngine


@final
class Blocks:
    """The pool of KV blocks: gives, takes back, and makes room by rule 3 of `Engine`.

    Attributes:
        engine: how many there are, and what becomes of a call that loses them.
        block_tokens: tokens in a block.
        free: blocks that nobody holds.
        holders: requests that hold any.
        peak: most blocks held at once.
        moved: blocks copied to or from the host since the last step.
        swapped: blocks copied to or from the host.
        prefilled_again: tokens whose KV was lost, to be computed again.
        trims: whether no more than `max_requests` requests may hold KV.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.free = engine.blocks
        self.holders = 0
        self.peak = 0
        self.moved = 0
        self.swapped = 0
        self.prefilled_again = 0
        self.block_tokens = engine.block_tokens  # looked up less often
        self.trims = engine.preemption in ("recompute", "swap")
        self._jobs: dict[JobOnEngine, None] = {}  # that may hold blocks
        # Calls that decode, by the steps, modulo `block_tokens`, that take them a block further.
        self._phases = [0] * engine.block_tokens

    def needed(self, calls: Calls, tokens: int) -> int:
        """Blocks that each of `calls` lacks for `tokens` more tokens."""
        return -(-(calls.computed + tokens) // self.block_tokens) - calls.blocks

    def hold(self, calls: Calls, tokens: int, step: int) -> bool:
        """Give blocks for `tokens` more tokens to as many of `calls` as can have them.

        Those are parted from the rest.

        Args:
            calls: which.
            tokens: how many each is to compute.
            step: how many steps have been carried out.

        Returns:
            Whether at least one could have them.
        """
        needed, job = self.needed(calls, tokens), calls.job
        if needed * calls.count > self.free:
            job.split(calls, max(self.free // needed, 1))
            if needed > self.free and not self._make_room(calls, needed, step):
                return False
        self.give(calls, needed)
        return True

    def give(self, calls: Calls, needed: int) -> None:
        """Give each of `calls` the blocks needed, which must be free, and what it had swapped."""
        if needed:
            if not calls.blocks:
                self._jobs[calls.job] = None
                self.holders += calls.count
            self.free -= needed * calls.count
            calls.blocks += needed
        if calls.swapped:
            self.moved += calls.swapped * calls.count
            calls.swapped = 0

    def enter(self, calls: Calls, step: int) -> None:
        """`calls` decode from `step` on, for which they hold the blocks they need."""
        self._phases[(step - calls.computed) % self.block_tokens] += calls.count

    def leave(self, calls: Calls, step: int, ahead: bool) -> None:
        """`calls` decode no longer from `step` on; their tokens are as of then.

        If blocks were taken for that step already, `ahead`, theirs are given back.
        """
        size, computed = self.block_tokens, calls.computed
        phase = (step - computed) % size
        self._phases[phase] -= calls.count
        calls.blocks = -(-computed // size)
        if ahead and phase == step % size:
            self.free += calls.count

    def growth(self, step: int, steps: int) -> int:
        """Blocks that the calls that decode need in `steps` steps, the first being `step`."""
        phases, size = self._phases, self.block_tokens
        if steps == 1:
            return phases[step % size]
        rounds, rest = divmod(steps, size)
        first = step % size
        end = first + rest
        blocks = sum(phases[first:end])
        if end > size:
            blocks += sum(phases[: end - size])
        return blocks + rounds * sum(phases) if rounds else blocks

    def take(self, blocks: int) -> None:
        """Take blocks for the calls that decode; they must be free."""
        self.free -= blocks

    def count(self) -> None:
        """A step has ended: note how many blocks are held, for `peak`."""
        held = self.engine.blocks - self.free
        if held > self.peak:
            self.peak = held

    def release(self, calls: Calls) -> None:
        """Take back the blocks of calls that are over."""
        self.free += calls.blocks * calls.count
        self.holders -= calls.count
        calls.blocks = 0

    def forget(self, job: JobOnEngine) -> None:
        """Take out a job whose calls are all over."""
        del self._jobs[job]

    def trim(self, step: int) -> None:
        """Let no more than `max_requests` requests hold KV, where the engine `trims`.

        `step` steps have been carried out.
        """
        while (excess := self.holders - self.engine.max_requests) > 0:
            self.lose(max(self._all(), key=_place), excess, step)

    def take_moved(self) -> int:
        """How many blocks were copied to or from the host since this was last asked."""
        moved, self.moved = self.moved, 0
        self.swapped += moved
        return moved

    def _all(self) -> list[Calls]:
        return [calls for job in self._jobs for calls in job.calls if calls.blocks]

    def _make_room(self, calls: Calls, needed: int, step: int) -> bool:
        """Free blocks of calls that come after `calls`, the last first, if that frees enough.

        Returns:
            Whether `needed` blocks are free now; if not, nothing has changed.
        """
        place = calls.place
        later = [holder for holder in self._all() if holder.place > place]
        if self.free + sum(holder.blocks * holder.count for holder in later) < needed:
            return False
        later.sort(key=_place)
        while self.free < needed:
            victims = later.pop()
            self.lose(victims, -(-(needed - self.free) // victims.blocks), step)
        return True

    def lose(self, victims: Calls, most: int, step: int) -> Calls:
        """Take the blocks of the last of `victims`, `most` of them if they are more.

        Returns:
            Those that have lost theirs, parted from the rest.
        """
        if most < victims.count:
            job, at = victims.job, victims.job.calls.index(victims)
            job.split(victims, victims.count - most)
            victims = job.calls[at + 1]
        victims.history += (~step, ~victims.computed)
        self.free += victims.blocks * victims.count
        self.holders -= victims.count
        if self.engine.preemption == "swap":
            victims.swapped = victims.blocks
            self.moved += victims.blocks * victims.count
        else:
            self.prefilled_again += victims.computed * victims.count
            victims.computed = 0
        victims.blocks = 0
        return victims


def _place(calls: Calls) -> tuple[object, int]:
    return calls.place
