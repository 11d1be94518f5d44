"""Pools in the middle of decoding, for the kernels and their twins."""

import torch


def random_pool(batch, heads, places, size, dim, value_dim, dtype, used=None, seed=0):
    """Pages in no order, each row's newest one not full; `used` of the places hold one."""
    g = torch.Generator().manual_seed(seed)
    used = places if used is None else used
    # Ranks of pages: some of the first 2 * places, with gaps, as after evictions.
    start = torch.full((batch, heads, places), -1, dtype=torch.int32)
    now = torch.empty(batch, dtype=torch.int64)
    for b in range(batch):
        newest = int(torch.randint(used, 2 * places + 1, (1,), generator=g))
        now[b] = newest * size + int(torch.randint(0, size, (1,), generator=g))
        for h in range(heads):
            older = torch.randperm(newest, generator=g)[: used - 1]
            at = torch.randperm(places, generator=g)[:used]
            start[b, h, at] = (torch.cat([older, torch.tensor([newest])]) * size).int()

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    inside = torch.arange(size)
    held = (start[..., None] >= 0) & (start[..., None] + inside <= now[:, None, None, None])
    slots = torch.where(held, start[..., None] + inside + 3, -1).flatten(2).int()
    kmin, kmax = normal(2, batch, heads, places, dim).sort(0).values
    return {
        "keys": normal(batch, heads, places * size, dim),
        "values": normal(batch, heads, places * size, value_dim),
        "slots": slots,
        "start": start,
        "stamp": start + 1,
        "sums": torch.rand(batch, heads, places, 2, generator=g),
        "pinned": torch.rand(batch, heads, places, generator=g) < 0.3,
        "kmin": kmin,
        "kmax": kmax,
        "current": start.argmax(-1),
    }, now
