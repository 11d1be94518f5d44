"""Chooses the requests of a step."""

from collections.abc import Callable
from heapq import heapify, heappush
from operator import attrgetter
from typing import final

from demand.policies.base import Policy
from demand.simulation.engine.batch import Batch
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.job_on_engine import NEVER, NOBODY, UNKNOWN, Calls, Place, Task
from demand.simulation.engine.order import RankOrder, Waiting


@final
class Batcher:
    """The engine at work: rules 1 to 3 of `Engine`.

    The batch goes on from step to step. Calls of it that do not decode yet, and those that wait,
    are served in order; one that lacks room, tokens or blocks displaces calls that decode and
    come after it. Nobody else needs a rank.

    Attributes:
        order: the tasks with calls.
        batch: the requests chosen.
        partial: a task that has calls in the batch and others that wait; `None` if there is none.
        moved: whether being left out of the batch changed a rank, so that the next may be another.
        until: steps carried out when a task of the batch is to be looked at.
        preemptions: times that a request was left out of the step after one it was in.
    """

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self.order = RankOrder(policy, engine.preemption != "none")
        self.batch = Batch(engine)
        self.partial: Task | None = None
        self.moved = False
        self.until = 0
        self.preemptions = 0

    def form(self, now: float, warm: Callable[[Task, float], bool]) -> None:
        """Choose the requests of the step that starts at second `now`.

        When the turn of a task comes that is `cold`, `warm` is asked whether its backend is warm.
        If not it is taken out of the order; the batch may be empty then.
        """
        order, batch = self.order, self.batch
        batch.formed += 1
        again = self._to_serve_anew(now)
        batch.open()
        served: list[Task] = []
        passed_over: list[Task] = []
        self.partial = None
        while self.partial is None:
            first = order.first(again)
            if first is NOBODY:
                break
            last = None
            if not (batch.room and batch.budget):
                last = self._last_after(first, now)
                if last is None:
                    break
            task = order.pop(again)
            if task.cold:
                task.cold = False
                if not warm(task, now):
                    continue
            lacking = self._displace(task, last, again, now)
            room = batch.room
            if lacking is None:
                if not self._serve(task):
                    self.partial = task
            else:
                self._serve_all(lacking)
            (passed_over if batch.room == room else served).append(task)
        batch.blocks.trim()
        passed_over += [task for _, task in again]
        self._settle(served, passed_over, now)
        batch.close()

    def advance(self, steps: int, now: float) -> tuple[list[Task], list[Task]]:
        """Carry out the step formed, `steps` times over, so that it ends at second `now`.

        Returns:
            The tasks whose present unit ended with it, and those whose alarms may be due, both in
            order of arrival.
        """
        order, batch = self.order, self.batch
        batch.advance(steps)
        step = batch.step
        touched = {calls.task: None for calls, _ in batch.prefilling}
        for task in order.running:
            if task.look <= step:
                touched[task] = None
        if order.reranks:  # who is served moves others
            for task in order.running:
                order.account(task, now, step)
        ended = []
        for task in touched:
            if task.bound is not UNKNOWN and task.attained(step) >= task.bound_holds_until:
                task.bound = UNKNOWN
            if batch.finish(task):
                order.account(task, now, step)
                order.leave(task)
                ended.append(task)
        alarmed = [task for task in touched if task.alarms and task.calls]
        ended.sort(key=_index)
        alarmed.sort(key=_index)
        return ended, alarmed

    def _to_serve_anew(self, now: float) -> Waiting:
        """Heap of the tasks of the last batch not all of whose calls decode.

        Where tokens or blocks do not suffice for the last batch, its last tasks are stopped and
        among them, so that they suffice for the others.
        """
        order, batch, blocks = self.order, self.batch, self.batch.blocks
        anew: dict[Task, tuple[int, int]] = {}
        for calls, _ in batch.prefilling:
            task = calls.task
            if task not in anew and task.job.running and not task.steady:
                anew[task] = self._asked(task)
        if self.partial is not None and self.partial not in anew:
            anew[self.partial] = (0, 0)
        budget = batch.engine.token_budget - batch.decoding
        free = blocks.free - blocks.growth(batch.step, 1)
        for tokens, needed in anew.values():
            budget -= tokens
            free -= needed
        if budget < 0 or free < 0:
            last = sorted(order.running, key=lambda task: order.rank(task, now, batch.step))
            while budget < 0 or free < 0:
                task = last.pop()
                tokens, needed = anew.get(task, (0, 0))
                budget += task.decoding + tokens
                free += needed + blocks.growth(batch.step, 1)
                self.preemptions += task.decoding
                batch.stop(task)
                free -= blocks.growth(batch.step, 1)
                anew[task] = (0, 0)
        if order.reranks:
            order.rerank(now)
        again = [(order.rank(task, now, batch.step), task) for task in anew]
        heapify(again)
        return again

    def _asked(self, task: Task) -> tuple[int, int]:
        """Tokens and blocks for the calls of `task` in the last batch that do not decode yet.

        They count as preempted until they are served.
        """
        batch = self.batch
        tokens = needed = 0
        for calls in task.calls:
            if calls.formed == batch.formed - 1:
                pending = calls.pending
                tokens += pending * calls.count
                needed += batch.blocks.needed(calls, pending) * calls.count
                self.preemptions += calls.count
        return tokens, needed

    def _displace(
        self, task: Task, last: Task | None, again: Waiting, now: float
    ) -> list[tuple[Calls, int, int]] | None:
        """Stop those that decode and come after `task`, last first, until it has what it needs.

        Args:
            last: of those, if it is known.

        Returns:
            Tokens and blocks for each of its calls that do not decode; `None` where not all of
            them can have theirs.
        """
        batch, blocks = self.batch, self.batch.blocks
        requests = task.requests - task.decoding
        while requests > batch.room:
            last = last or self._last_after(task.place, now)
            if last is None:
                return None
            self._give_way(last, again)
            last = None
        tokens = needed = 0
        lacking = []
        size = blocks.block_tokens
        for calls in task.calls:
            if not calls.over:
                known = calls.input_tokens + calls.generated
                pending = known - calls.computed
                lacks = -(-known // size) - calls.blocks
                tokens += pending * calls.count
                needed += lacks * calls.count
                lacking.append((calls, pending, lacks))
        while tokens > batch.budget or needed > blocks.free:
            last = last or self._last_after(task.place, now)
            if last is None:
                return None
            self._give_way(last, again)
            last = None
        return lacking

    def _give_way(self, task: Task, again: Waiting) -> None:
        """Stop the calls of `task` that decode, so that others can be served."""
        if task.steady:
            heappush(again, (task.place, task))
        self.preemptions += task.decoding
        self.batch.displace(task)

    def _last_after(self, place: Place, now: float) -> Task | None:
        """The last of the tasks that decode, if it comes after `place`; ranked only to tell."""
        tasks = [task for task in self.order.running if task.bound > place and task.decoding]
        if len(tasks) > 1:
            tasks.sort(key=_bound, reverse=True)
        last = None
        for task in tasks:
            if last is not None and task.bound < last.place:
                break
            if task.bound is not task.place:
                self.order.rank(task, now, self.batch.step)
            if task.place > (place if last is None else last.place):
                last = task
        return last

    def _serve(self, task: Task) -> bool:
        """Serve the calls of `task` that do not decode yet, as far as possible.

        Returns:
            Whether all of them are.
        """
        batch = self.batch
        for calls in task.calls:  # a part that is split off is next
            if calls.over:
                continue
            room, budget = batch.room, batch.budget
            if not (room and budget):
                return False
            pending = calls.input_tokens + calls.generated - calls.computed
            tokens = pending if pending < budget else budget
            if calls.count > room or calls.count * tokens > budget:
                task.split(calls, min(room, budget // tokens))
            if not batch.blocks.hold(calls, tokens):
                return False
            if calls.formed == batch.formed - 1:
                self.preemptions -= calls.count
            batch.add(calls, tokens)
        return True

    def _serve_all(self, lacking: list[tuple[Calls, int, int]]) -> None:
        """Serve calls that do not decode yet, with their tokens and the blocks that each lacks."""
        batch, blocks = self.batch, self.batch.blocks
        last_formed = batch.formed - 1
        for calls, tokens, lacks in lacking:
            blocks.give(calls, lacks)
            if calls.formed == last_formed:
                self.preemptions -= calls.count
            batch.add(calls, tokens)

    def _settle(self, served: list[Task], passed_over: list[Task], now: float) -> None:
        """Let those that have no call in the batch wait, and find when to look at the others."""
        order, step = self.order, self.batch.step
        self.moved = False
        self.until = step + 1
        for task in passed_over:
            if task.decoding:
                self.partial = task
            else:
                place = task.place
                order.stop(task, now)
                self.moved |= task.place != place
        for task in served:
            order.start(task)
        partial = self.partial
        if partial is not None and not partial.job.running:
            partial = self.partial = None
        if order.reranks:
            for task in order.running:
                task.bound, task.look = UNKNOWN, step + 1
            return
        if self.batch.prefilling:  # looks at the next step anyway
            for task in order.running:
                if task.bound is task.place:
                    task.bound = UNKNOWN
            return
        best = order.best_waiting
        if partial is not None:
            if partial.bound is not partial.place:
                order.rank(partial, now, step)
            best = min(best, partial.place)
        until = NEVER
        for task in order.running:
            if task is not partial and (task.bound is task.place or task.bound > best):
                order.watch(task, now, step, best)
                if task.bound is UNKNOWN:
                    until = step + 1
            elif task.look <= step:
                task.look = task.next_look(step)
            if task.look < until:
                until = task.look
        self.until = until


_bound = attrgetter("bound")


def _index(task: Task) -> int:
    return task.job.index
