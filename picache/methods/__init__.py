"""Link methods: which tokens to recompute when chunks are linked. One paper, one file."""

from picache.methods.a3 import A3
from picache.methods.ape import APE
from picache.methods.cacheblend import CacheBlend
from picache.methods.combined import Combined
from picache.methods.full_recompute import FullRecompute
from picache.methods.legolink import LegoLink
from picache.methods.naive_reuse import NaiveReuse
from picache.methods.oracle_deviation import OracleDeviation
from picache.methods.prophetkv import ProphetKV
from picache.methods.random_recompute import RandomRecompute

__all__ = [
    "A3",
    "APE",
    "CacheBlend",
    "Combined",
    "FullRecompute",
    "LegoLink",
    "NaiveReuse",
    "OracleDeviation",
    "ProphetKV",
    "RandomRecompute",
]
