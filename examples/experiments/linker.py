"""What links by a model of examples/models.py, made once in a process.

A worker finds it here: of the script that runs, it is sent a copy, whose caches stay behind.
"""

from functools import cache

import torch
from link_turns import LONGEST
from loaded import loaded

from picache import PIC

ROOM = 256
"""Tokens of a prompt besides its documents and its question: instruction, template, answer."""


@cache
def linker(model_name: str, together: int) -> PIC:
    """What links in this process; on a GPU with memory for the longest prompts from the start."""
    pic = PIC(*loaded(model_name, torch.float32), flops_per_byte=None)
    if torch.cuda.is_available():
        pic.warm_up(LONGEST + ROOM, rows=1, batch=together, progress=False)
    return pic
