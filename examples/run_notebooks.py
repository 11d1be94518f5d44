"""Execute the notebooks of docs/notebooks, each in a new kernel, and compare what they print.

    python examples/run_notebooks.py [NOTEBOOK ...] [--write]

Fails on an error in a cell, on anything written to stderr, and on text that differs from the
outputs that the file holds: streams, and texts and HTML tables of results. A number with decimals
may differ by one in its last digit, since sums are rounded otherwise on another processor; cells
that carry the tag "varies" (seconds) may print anything. Pictures are not compared. Needs the extra
"notebooks".
"""

import argparse
import copy
import os
import re
import sys
import time
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
TIMEOUT_SECONDS = 1800  # of a cell, on a machine that does much else
SHOWN = ("text/html", "text/markdown", "text/plain")
"""The texts of a result, of which the first that there is counts: it is the one that is shown."""
QUIET = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
WIDGET = "application/vnd.jupyter.widget-view+json"
"""Progress bars are for who runs a notebook, and not for the outputs that are kept."""
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def executed(path: Path) -> NotebookNode:
    """The notebook with the outputs of a run in a new kernel, in its own folder.

    Raises:
        CellExecutionError: an error in a cell.
    """
    notebook = nbformat.read(path, as_version=4)
    metadata = copy.deepcopy(notebook.metadata)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute(env={**os.environ, **QUIET})
    notebook.metadata = metadata  # the kernel adds the release of Python
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if WIDGET not in one.get("data", {})]
    return notebook


def texts(cell: NotebookNode) -> list[str]:
    """What a code cell has put out as text, streams joined."""
    streams: dict[str, str] = {}
    shown = []
    for output in cell.outputs:
        if output.output_type == "stream":
            streams[output.name] = streams.get(output.name, "") + output.text
        elif output.output_type in ("execute_result", "display_data"):
            shown += [output.data[kind] for kind in SHOWN if kind in output.data][:1]
    return [*streams.values(), *shown]


def same(stored: str, found: str) -> bool:
    """Whether two texts are alike but for one in the last digit of numbers with decimals."""
    if _NUMBER.sub("#", stored) != _NUMBER.sub("#", found):
        return False
    pairs = zip(_NUMBER.findall(stored), _NUMBER.findall(found), strict=True)
    return all(_near(Decimal(one), Decimal(other)) for one, other in pairs)


def _near(one: Decimal, other: Decimal) -> bool:
    exponents = [int(number.as_tuple().exponent) for number in (one, other)]
    last = Decimal(0) if exponents == [0, 0] else Decimal(10) ** max(exponents)
    return abs(one - other) <= last


def differences(stored: NotebookNode, found: NotebookNode) -> list[str]:
    """A line for each text of a cell that is not what the file holds, or went to stderr."""
    lines = []
    for number, (before, after) in enumerate(zip(stored.cells, found.cells, strict=True)):
        if after.cell_type != "code":
            continue
        lines += [
            f"cell {number} writes to stderr: {output.text!r}"
            for output in after.outputs
            if output.output_type == "stream" and output.name == "stderr"
        ]
        if "varies" in after.metadata.get("tags", []):
            continue
        for old, new in zip_longest(texts(before), texts(after), fillvalue=""):
            if not same(old, new):
                lines.append(f"cell {number} has {old!r} in the file and now {new!r}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of docs/notebooks by default")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    args = parser.parse_args()
    failed = False
    for path in args.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        begun = time.perf_counter()
        try:
            found = executed(path)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", flush=True)
            failed = True
            continue
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s", flush=True)
        different = differences(nbformat.read(path, as_version=4), found)
        if args.write:
            nbformat.write(found, path)
            different = [line for line in different if "stderr" in line]
        failed = failed or bool(different)
        print(*different, sep="\n", end="\n" if different else "", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
