"""Chunks and names that tests of the disk share."""

import torch

KEY = "ab" + "0" * 62
OTHER = "cd" + "0" * 62
NAMES = [f"{i:02}abcdef" for i in range(100)]  # keys of one length, in shards of their own


def chunk(seed=0, tokens=5, layers=3):
    made = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(1, 2, tokens, 4, generator=made), torch.randn(1, 2, tokens, 4, generator=made))
        for _ in range(layers)
    ]


def files(path):
    return sorted(path.rglob("*.safetensors"))


def leftovers(path):
    return sorted(path.rglob("*.tmp"))
