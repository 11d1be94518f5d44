"""Attack a chunk store in every way, and count.

    python -m tests.picache.attacks            # minutes
    python -m tests.picache.attacks --short    # under a minute

Prints, for each attack, what was asked of the store, how much of it was found and right, what was
refused as the interface promises, what failed and what was wrong. The last two are to be 0; the
first failure of each attack is printed, and the exit status is then 1.
"""

import argparse
import sys
import time

import torch

from tests.picache.attacks import faults, neighbours

ATTACKS = {
    "kill -9 at random moments": neighbours.kills,
    "four processes": neighbours.processes,
    "eight threads": neighbours.threads,
    "full disks": neighbours.full_disk,
    "system calls that fail": faults.system_calls,
    "a network that fails": faults.network,
    "crafted files": faults.crafted_files,
    "links beside vandals": faults.vandals,
}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a tenth of everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=ATTACKS, help="one attack")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [args.only] if args.only else list(ATTACKS)
    print(f"{'attack':28}{'trials':>8}{'right':>8}{'refused':>9}{'failures':>10}{'wrong':>7}   s")
    first_failures, bad = [], 0
    for name in names:
        begun = time.monotonic()
        tally = ATTACKS[name](0.1 if args.short else 1.0, args.seed)
        took = time.monotonic() - begun
        print(
            f"{name:28}{tally.trials:8}{tally.hits:8}{tally.refused:9}"
            f"{len(tally.failures):10}{tally.wrong:7}{took:6.1f}",
            flush=True,
        )
        bad += len(tally.failures) + tally.wrong
        first_failures += [f"{name}:\n{failure}" for failure in tally.failures[:1]]
    print(*first_failures, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
