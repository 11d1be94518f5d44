"""Reading a trace: an iterable of its records that counts what it read and what it skipped."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar, final

from demand.errors import DemandError
from demand.traces.fields import Clock, Fields, MalformedRecordError, TwoClocksError
from demand.traces.sources import Source

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
OnError = Literal["raise", "skip"]


class Parser(Protocol[T_co]):
    """Makes sessions or requests of records, for one reading of a trace."""

    def feed(self, record: Fields) -> Iterable[T_co]:
        """Take in one record, and give the sessions or requests that are complete with it."""

    def finish(self) -> Iterable[T_co]:
        """The sessions or requests that are complete because the trace is over.

        No line can be blamed any more: check in `feed` all that is fed.
        """


class OneByOne(Generic[T]):
    """The parser of a format in which each record stands for itself."""

    def __init__(self, parse: Callable[[Fields], T]) -> None:
        self._parse = parse

    def feed(self, record: Fields) -> Iterable[T]:
        """The session or request that the record is."""
        return (self._parse(record),)

    def finish(self) -> Iterable[T]:
        """Nothing: every record was complete by itself."""
        return ()


@final
class Trace(Generic[T]):
    """A trace on disk, read as it is iterated; each iteration reads it anew from the start.

    Attributes:
        path: of the file or folder.
        read: sessions or requests yielded by the latest iteration, so far.
        skipped: records it skipped, by field and reason; empty unless `on_error="skip"`.

    Raises:
        DemandError: while iterating, for a malformed line (with file, line number and field), for
            a file of another format, for one that begins before the file before it ends, or when
            the trace is over and nothing could be read.
        FileNotFoundError: no file at `path`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: Source,
        parser: Callable[[], Parser[T]],
        on_error: OnError,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise DemandError(f'on_error is {on_error!r}; expected "raise" or "skip"')
        self.path = Path(path)
        self.read = 0
        self.skipped: Counter[str] = Counter()
        self._source = source
        self._parser = parser
        self._on_error = on_error

    def __iter__(self) -> Iterator[T]:
        self.read, self.skipped = 0, Counter()
        parser, clock = self._parser(), Clock()
        for record in self._source(self.path, clock):
            try:
                complete = tuple(parser.feed(_sound(record)))
            except TwoClocksError:
                raise
            except DemandError as error:
                clock.end_record(good=False)
                self._skip(_located(error, record))
                continue
            clock.end_record(good=True)
            yield from self._counted(complete)
        try:
            rest = tuple(parser.finish())
        except DemandError as error:
            raise DemandError(f"{self.path}, at its end: {error}") from error
        yield from self._counted(rest)
        if not self.read:
            seen = f"{self.skipped.total()} lines were skipped: {dict(self.skipped)}"
            raise DemandError(
                f"{self.path} has no record that can be read; "
                + (seen if self.skipped else "the file is empty")
            )

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, read {self.read}, skipped {self.skipped.total()})"

    def _counted(self, complete: Iterable[T]) -> Iterator[T]:
        for item in complete:
            self.read += 1
            yield item

    def _skip(self, error: MalformedRecordError) -> None:
        if self._on_error == "raise":
            raise error
        field = re.sub(r"\[\d+\]", "[]", error.field) or "record"
        self.skipped[f"{field}: {error.problem}"] += 1


def _sound(record: Fields | MalformedRecordError) -> Fields:
    if isinstance(record, MalformedRecordError):
        raise record
    return record


def _located(error: DemandError, record: Fields | MalformedRecordError) -> MalformedRecordError:
    if isinstance(error, MalformedRecordError) or isinstance(record, MalformedRecordError):
        assert isinstance(error, MalformedRecordError)
        return error
    return MalformedRecordError(record.file, record.line, "", str(error))
