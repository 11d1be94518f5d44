"""Sizes that are rounded up, so that few of them occur."""

_STEP = 16


def size_class(size: int) -> int:
    """The smallest class that holds `size`: multiples of 16, from 128 on at most 12.5 % larger."""
    step = max(_STEP, (1 << size.bit_length() - 1) // 8)
    return -(-size // step) * step


def classes_up_to(size: int) -> list[int]:
    """All classes up to that of `size`, ascending."""
    found = [size_class(1)]
    while found[-1] < size:
        found.append(size_class(found[-1] + 1))
    return found
