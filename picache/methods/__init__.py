"""What to recompute when chunks are linked; one paper a file."""

from picache.methods.full_recompute import FullRecompute
from picache.methods.legolink import LegoLink
from picache.methods.naive_reuse import NaiveReuse
from picache.methods.random_recompute import RandomRecompute

__all__ = ["FullRecompute", "LegoLink", "NaiveReuse", "RandomRecompute"]
