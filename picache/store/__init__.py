"""The store of compiled chunks: on the device, in page-locked host memory, and on disk."""

from picache.store.chunk_store import ChunkStore, StoreStats, TierStats
from picache.store.stored import StoredChunk

__all__ = ["ChunkStore", "StoreStats", "StoredChunk", "TierStats"]
