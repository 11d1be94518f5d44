"""Where compiled chunks live: device, pinned host memory and disk."""

from picache.store.chunk_store import ChunkStore, StoreStats, TierStats
from picache.store.stored import StoredChunk, kv_bytes

__all__ = ["ChunkStore", "StoreStats", "StoredChunk", "TierStats", "kv_bytes"]
