"""A record that a run adds to until its time is over, and that the next run goes on from."""

import gzip
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read(file: Path) -> dict[str, Any]:
    """A record as `GrowingRecord.write` left it."""
    record: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return record


class GrowingRecord:
    """A record in a file, which holds it whole or as it was before.

    Args:
        file: where it is kept, as compressed JSON; what an earlier run left there is gone on from.
        record: as it begins, with a "configuration" and the "seconds" that runs took so far.
        names: what is taken over from an earlier run, besides the seconds.

    Attributes:
        record: as it stands, to be added to.

    Raises:
        SystemExit: where the earlier run was of another configuration.
    """

    def __init__(self, file: Path, record: dict[str, Any], names: Iterable[str]) -> None:
        self._file, self._begun = file, time.time()
        self.record = record
        if file.exists():
            earlier = read(file)
            if earlier["configuration"] != record["configuration"]:
                raise SystemExit(f"{file} is of another configuration: give another --out")
            record |= {name: earlier[name] for name in (*names, "seconds")}
        self._before = record["seconds"]

    def write(self) -> None:
        """Write what there is; the run may be ended at any time."""
        self.record["seconds"] = self._before + time.time() - self._begun
        part = self._file.with_suffix(".part")
        part.write_bytes(gzip.compress(json.dumps(self.record).encode(), 4))
        part.replace(self._file)
