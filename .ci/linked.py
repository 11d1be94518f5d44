"""Links with the installed packages, away from any checkout. Run by an interpreter with -I.

    python -I .ci/linked.py readme                     README's linking block, as published
    python -I .ci/linked.py quickstart EXAMPLES MODEL  the quickstart's linking on eight questions

The README is read from the distribution's own metadata; its block loads examples/reference_model
from the working directory.
"""

import re
import sys
from importlib.metadata import metadata
from pathlib import Path

import demand
import picache
import sparsity

QUESTIONS = 8


def check_installed() -> None:
    """The three packages are those of this environment."""
    for package in (demand, picache, sparsity):
        if not Path(str(package.__file__)).is_relative_to(sys.prefix):
            sys.exit(f"{package.__name__} comes from {package.__file__}, not from the wheel")


def readme() -> None:
    """Run the first block of the README that imports picache."""
    blocks = re.findall(r"```python\n(.*?)```", str(metadata("picache").get_payload()), re.DOTALL)
    block = next(block for block in blocks if "from picache import" in block)
    exec(compile(block, "README of the wheel", "exec"), {})


def quickstart(examples: str, name: str) -> None:
    """Two arms of the quickstart, on its own questions: LegoLink lies between full and naive."""
    sys.path[:0] = [f"{examples}/experiments", examples]
    import models
    from questions import link_problems
    from quickstart import METHODS

    model, tokenizer = models.load(name)
    arms = {arm: METHODS[arm] for arm in ("naive", "LegoLink-4")}
    problems = link_problems(name, QUESTIONS)
    result = picache.compare(model, tokenizer, problems, arms, new_tokens=6)
    print(result)
    if name == "smollm2":
        full, naive, lego = (result[arm]["nll"].estimate for arm in ("full", *arms))
        if not full < lego < naive:
            sys.exit(f"NLL: full {full}, LegoLink-4 {lego}, naive {naive}; expected to ascend")


if __name__ == "__main__":
    check_installed()
    {"readme": readme, "quickstart": quickstart}[sys.argv[1]](*sys.argv[2:])
