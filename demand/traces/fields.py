"""The fields of a record of a trace, checked as they are read; errors name file, line and field."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from demand.errors import DemandError

LONGEST_QUOTE = 240
"""Characters of what was seen that an error repeats: a field may be megabytes long."""


class MalformedRecordError(DemandError):
    """A record that does not hold what its format says.

    Attributes:
        field: the field at fault, with its path inside of the record.
        problem: what is wrong, the same words for the same fault: what skips are counted by.
    """

    def __init__(self, file: Path, line: int, field: str, problem: str, seen: str = "") -> None:
        self.field = field
        self.problem = problem
        where = f"{file}, line {line}" + (f", field {field!r}" if field else "")
        super().__init__(f"{where}: {problem}" + (f" ({seen:.{LONGEST_QUOTE}})" if seen else ""))


class TwoClocksError(DemandError):
    """A folder whose files do not follow each other in time; no line of it is at fault."""


class Clock:
    """Turns the times of one trace into seconds since its first good record.

    A record reads its time before all of it is known to be good, so reading alone moves nothing.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._latest = -math.inf
        self._file: Path | None = None
        self._read: tuple[float, Path] | None = None

    def elapsed(self, seconds: float, file: Path) -> float | None:
        """Seconds since the first good record, or `None` if the clock would go backwards.

        Raises:
            TwoClocksError: it would, with the first record of a file.
        """
        if seconds < self._latest:
            if file == self._file:
                return None
            raise TwoClocksError(
                f"{file} begins before {self._file} ends; expected the files of a folder to "
                "follow each other on one clock, in order of their names: read each on its own"
            )
        self._read = seconds, file
        first = seconds if self._first is None else self._first
        return round(seconds - first, 6)  # Unix time as a float resolves no more

    def end_record(self, good: bool) -> None:
        """Tell the clock that a record is over: if it was `good`, the clock moves to its time."""
        if good and self._read is not None:
            self._latest, self._file = self._read
            self._first = self._latest if self._first is None else self._first
        self._read = None


class Fields:
    """A record: named fields, checked as they are read.

    Args:
        values: the decoded record.
        file: it stands in.
        line: it starts at.
        clock: of the trace.
        inside: path to it, for a record within a record.
    """

    def __init__(
        self, values: Mapping[str, Any], file: Path, line: int, clock: Clock, inside: str = ""
    ) -> None:
        self.values = values
        self.file = file
        self.line = line
        self._clock = clock
        self._inside = inside

    def malformed(self, name: str, problem: str, seen: str = "") -> MalformedRecordError:
        """An error that says what is wrong with field `name`, to be raised by the caller."""
        return MalformedRecordError(self.file, self.line, self._inside + name, problem, seen)

    def has(self, name: str) -> bool:
        """Whether the field is there and neither null nor empty."""
        return self.values.get(name) not in (None, "")

    def number(self, name: str) -> float:
        """A finite number of at least 0.

        Raises:
            MalformedRecordError: missing, not a number, negative, NaN or infinite.
        """
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | float | str) or _grouped(value):
            raise self.malformed(name, "expected a number", f"seen: {value!r:.60}")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise self.malformed(name, "expected a number", f"seen: {value!r:.60}") from None
        if not 0.0 <= number < math.inf:
            raise self.malformed(name, "expected at least 0 and finite", f"seen: {value!r:.60}")
        return number

    def tokens(self, name: str) -> int:
        """A whole number of at least 0.

        Raises:
            MalformedRecordError: as `number`, or a fraction.
        """
        number = self.number(name)
        if number % 1:
            raise self.malformed(name, "expected whole tokens", f"seen: {number}")
        return int(number)

    def seconds(self, name: str) -> float | None:
        """Seconds of at least 0; `None` where the field is missing or null."""
        return self.number(name) if self.has(name) else None

    def time(self, name: str) -> float:
        """An ISO 8601 time as Unix seconds; without a zone it is taken as UTC.

        Raises:
            MalformedRecordError: missing, or not such a time.
        """
        value = self.text(name)
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise self.malformed(
                name, "expected an ISO 8601 time", f"seen: {value!r:.60}"
            ) from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

    def arrival(self, name: str, seconds: float) -> float:
        """`seconds`, which field `name` says, counted from the first good record of the trace.

        Raises:
            MalformedRecordError: the time is before that of the good record before.
            TwoClocksError: that of a record in another file.
        """
        elapsed = self._clock.elapsed(seconds, self.file)
        if elapsed is None:
            raise self.malformed(name, "time goes backwards", f"seen: {self.values[name]!r:.60}")
        return elapsed

    def text(self, name: str) -> str:
        """A string.

        Raises:
            MalformedRecordError: missing, or something else.
        """
        value = self._value(name)
        if not isinstance(value, str):
            raise self.malformed(name, "expected a string", f"seen: {value!r:.60}")
        return value

    def identifier(self, name: str) -> str:
        """A string or a whole number, as a string.

        Raises:
            MalformedRecordError: missing, or something else.
        """
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.malformed(name, "expected an id", f"seen: {value!r:.60}")
        return str(value)

    def integer(self, name: str) -> int:
        """A whole number, exact at any size, as a number or in digits.

        Raises:
            MalformedRecordError: missing, or something else.
        """
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | str) or _grouped(value):
            raise self.malformed(name, "expected a whole number", f"seen: {value!r:.60}")
        try:
            return int(value)
        except ValueError:
            raise self.malformed(name, "expected a whole number", f"seen: {value!r:.60}") from None

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; empty where the field is missing.

        Raises:
            MalformedRecordError: something else.
        """
        values = self.values.get(name, [])
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise self.malformed(name, "expected a list of whole numbers", f"seen: {values!r:.60}")
        return tuple(values)

    def numbers(self, name: str) -> list[float]:
        """A list of samples: finite numbers of at least 0, one or more.

        Raises:
            MalformedRecordError: missing, empty, or something else.
        """
        if not self._list(name):
            raise self.malformed(name, "has no samples")
        values = {f"{name}[{at}]": value for at, value in enumerate(self._list(name))}
        items = Fields(values, self.file, self.line, self._clock, self._inside)
        return [items.number(item) for item in values]

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings.

        Raises:
            MalformedRecordError: missing, or something else.
        """
        values = self._list(name)
        if not all(isinstance(value, str) for value in values):
            raise self.malformed(name, "expected a list of strings", f"seen: {values!r:.60}")
        return tuple(values)

    def record(self, name: str) -> "Fields":
        """A record within this one.

        Raises:
            MalformedRecordError: missing, or not an object.
        """
        return self.within(name, self._value(name))

    def records(self, name: str) -> list["Fields"]:
        """The records of a list within this one.

        Raises:
            MalformedRecordError: missing, not a list, or a list of something else.
        """
        values = self._list(name)
        return [self.within(f"{name}[{at}]", value) for at, value in enumerate(values)]

    def within(self, path: str, value: Any) -> "Fields":
        """`value` as a record that stands at `path` of this one.

        Raises:
            MalformedRecordError: not an object.
        """
        if not isinstance(value, dict):
            raise self.malformed(path, "expected an object", f"seen: {value!r:.60}")
        return Fields(value, self.file, self.line, self._clock, f"{self._inside}{path}.")

    def _list(self, name: str) -> list[Any]:
        values = self._value(name)
        if not isinstance(values, list):
            raise self.malformed(name, "expected a list", f"seen: {values!r:.60}")
        return values

    def _value(self, name: str) -> Any:
        value = self.values.get(name)
        if value is None:
            known = ", ".join(map(str, self.values))
            raise self.malformed(name, "missing", f"fields seen: {known:.200}")
        return value


def _grouped(value: object) -> bool:
    """Whether digits are grouped as in "1_000", which Python reads and no format writes."""
    return isinstance(value, str) and "_" in value
