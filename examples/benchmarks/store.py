"""What a chunk store's operations cost by how many chunks it holds.

    python examples/benchmarks/store.py --out docs/results
    python examples/benchmarks/store.py --out docs/results --folder /dev/shm

Chunks are small, so that what is timed is the bookkeeping. In memory: a hit, and a put for which
another chunk leaves. On disk, in a folder that is full to its bound: opening it, a hit, a put for
which files leave, and the counters. The folder is filled without a sync; the first look,
which makes the index from them, is timed once. Medians of `--repeats`. A second row says
how many times the smallest store's time that is. Writes `store.json`.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from picache import ChunkStore
from picache.chunk import Header
from picache.store.chunkfile import pack

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment


def key_of(number: int) -> str:
    """A key of hexadecimal digits, evenly spread over shards as content keys are."""
    return f"{(number * 2654435761) % 2**32:08x}{number:024x}"


def small_chunk() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))]


def median_ms(work, repeats: int) -> float:
    """Median milliseconds of a call, which is given its number."""
    times = []
    for repeat in range(repeats):
        begun = time.perf_counter()
        work(repeat)
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def in_memory(count: int, repeats: int) -> dict[str, float]:
    kv = small_chunk()
    nbytes = sum(tensor.nbytes for layer in kv for tensor in layer)
    store = ChunkStore(device_bytes=count * nbytes)
    for number in range(count):
        store.put(key_of(number), kv)
    row = {
        "memory_get": median_ms(lambda n: store.get(key_of(n % count)), repeats),
        "memory_put_evicting": median_ms(lambda n: store.put(key_of(count + n), kv), repeats),
    }
    assert store.evictions == repeats
    return row


def on_disk(count: int, repeats: int, folder: Path) -> dict[str, float]:
    kv = small_chunk()
    header = Header(dtype="float32", tokens=4)
    layers = [{"keys": keys, "values": values} for keys, values in kv]
    ChunkStore(path=folder)  # leaves the marker
    below, nbytes = folder / "exact" / "ns=", 0
    for number in range(count):
        key = key_of(number)
        path = below / key[:2] / f"{key}.safetensors"
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.writelines(pack(key, header, layers))
            nbytes += file.tell()
    bound = nbytes + nbytes // count // 2

    def opened(_=0) -> ChunkStore:
        return ChunkStore(device_bytes=1, path=folder, disk_bytes=bound)

    store = opened()
    row = {"disk_first_look": median_ms(lambda _: store.stats(), 1)}
    row["disk_open"] = median_ms(opened, repeats)
    row["disk_get"] = median_ms(lambda n: store.get(key_of(n % count)).load(), repeats)
    row["disk_put_evicting"] = median_ms(lambda n: store.put(key_of(count + n), kv), repeats)
    row["disk_stats"] = median_ms(lambda _: store.stats(), repeats)
    assert store.stats().tiers[-1].chunks == count
    assert store.stats().failures == {}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where files are written; a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for count in args.counts:
        folder = Path(tempfile.mkdtemp(prefix="picache-store-", dir=args.folder))
        try:
            row = in_memory(count, args.repeats) | on_disk(count, args.repeats, folder / "chunks")
        finally:
            shutil.rmtree(folder)
        rows.append({"chunks": count, "milliseconds": row})
        first = rows[0]["milliseconds"]
        print(f"{count:7} chunks  " + "  ".join(f"{n} {ms:.3f}" for n, ms in row.items()))
        print(" " * 16 + "  ".join(f"{n} x{ms / first[n]:.2f}" for n, ms in row.items()))
    record = {
        "configuration": {
            "counts": args.counts,
            "repeats": args.repeats,
            "folder": str(args.folder or "temporary"),
        },
        "environment": environment(),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "store.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
