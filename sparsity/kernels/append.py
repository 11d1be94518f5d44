"""Write one token for each row into its newest page, or into a new one."""

import torch
from torch import Tensor


def append(
    keys: Tensor, values: Tensor, slots: Tensor, start: Tensor, stamp: Tensor, sums: Tensor,
    pinned: Tensor, kmin: Tensor | None, kmax: Tensor | None, current: Tensor, key: Tensor,
    value: Tensor, worth: Tensor | None, rank: Tensor, column: Tensor, valid: Tensor, page_size: int,
) -> None:  # fmt: skip
    """Placeholder twin until the kernels land."""
    places = start.shape[-1]
    if worth is None:
        worth = torch.where(start < 0, -torch.inf, torch.inf)
    opens = (valid & (rank % page_size == 0))[:, None]
    least = worth.amin(-1, keepdim=True)
    age = torch.where(worth == least, start, torch.iinfo(start.dtype).max)
    place = torch.where(opens, age.argmin(-1), current)
    here = torch.arange(places, device=start.device) == place[..., None]
    opened = here & opens[..., None]
    slots.unflatten(-1, (-1, page_size)).masked_fill_(opened[..., None], -1)
    first = rank[:, None, None].to(start.dtype)
    start.copy_(torch.where(opened, first, start))
    stamp.copy_(torch.where(opened, first, stamp))
    sums.masked_fill_(opened[..., None], 0)
    pinned.masked_fill_(opened, False)
    current.copy_(place)
    real = valid[:, None, None]
    if kmin is not None and kmax is not None:
        at = place[..., None, None].expand(-1, -1, 1, key.shape[-1])
        low, high = kmin.gather(2, at)[:, :, 0], kmax.gather(2, at)[:, :, 0]
        new_low = torch.where(opens[..., None], key, torch.minimum(low, key))
        new_high = torch.where(opens[..., None], key, torch.maximum(high, key))
        kmin.scatter_(2, at, torch.where(real, new_low, low)[:, :, None])
        kmax.scatter_(2, at, torch.where(real, new_high, high)[:, :, None])
    slot = (place * page_size + (rank % page_size)[:, None])[..., None]
    for held, new in ((keys, key), (values, value)):
        at = slot[..., None].expand(-1, -1, 1, new.shape[-1])
        old = held.gather(2, at)[:, :, 0]
        held.scatter_(2, at, torch.where(real, new, old)[:, :, None])
    old_slot = slots.gather(2, slot)
    slots.scatter_(2, slot, torch.where(real, column.to(slots.dtype), old_slot))
