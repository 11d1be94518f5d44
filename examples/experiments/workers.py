"""The argument that says who works on a sweep, the same for every script."""

import argparse

from demand import DemandError
from demand.sweep import checked_workers


def add_workers(parser: argparse.ArgumentParser) -> None:
    """`--workers`, for `demand.sweep.spread` and what passes it on."""
    parser.add_argument(
        "--workers",
        type=_workers,
        default=1,
        help='processes, or a Ray cluster as "ray://HOST:PORT"; the numbers are the same',
    )


def _workers(text: str) -> int | str:
    try:
        return checked_workers(text)
    except DemandError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
