"""How fast a layer's bytes are hashed, by hash and threads.

    pip install blake3
    python examples/benchmarks/hashes.py --out docs/results

Each thread hashes layers of its own; the bytes of all of them together are more than the
processor's caches hold. Hashes and thread counts take turns; the best of `--repeats`, since what
else runs on the machine only ever adds. Writes `hashes.json`.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment

CRYPTOGRAPHIC = {"SHA-256 (hashlib)", "BLAKE2b (hashlib)", "BLAKE3 (blake3)"}


def hashes() -> dict[str, Callable[[bytes], object]]:
    """What is compared, by name."""
    import blake3  # nothing else here needs it

    return {
        "SHA-256 (hashlib)": lambda data: hashlib.sha256(data).digest(),
        "BLAKE2b (hashlib)": lambda data: hashlib.blake2b(data).digest(),
        "BLAKE3 (blake3)": lambda data: blake3.blake3(data).digest(),
        "XXH3 128 (xxhash)": lambda data: xxhash.xxh3_128(data).digest(),
    }


def gigabytes_a_second(work: Callable[[bytes], object], layers: list[bytes], threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        list(pool.map(work, layers))
        return sum(map(len, layers)) / (time.perf_counter() - begun) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**18, 2**23], help="of a layer")
    parser.add_argument("--total", type=int, default=2**27, help="bytes hashed in a turn")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    best: dict[tuple[str, int, int], float] = {}
    layers = {size: [os.urandom(size) for _ in range(args.total // size)] for size in args.sizes}
    for _ in tqdm(range(args.repeats), desc="repeats"):
        for name, work in hashes().items():
            for size in args.sizes:
                for threads in args.threads:
                    rate = gigabytes_a_second(work, layers[size], threads)
                    best[name, size, threads] = max(best.get((name, size, threads), 0.0), rate)
    rows = [
        {
            "hash": name,
            "cryptographic": name in CRYPTOGRAPHIC,
            "layer_bytes": size,
            "threads": threads,
            "gigabytes_a_second": rate,
        }
        for (name, size, threads), rate in best.items()
    ]
    packages = {name: importlib.metadata.version(name) for name in ("blake3", "xxhash")}
    record = {
        "configuration": {
            name: getattr(args, name) for name in ("threads", "sizes", "total", "repeats")
        }
        | {"seed": "none: random bytes"},
        "environment": environment() | packages,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "hashes.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['hash']:20} {row['layer_bytes']:10,} bytes {row['threads']} threads "
            f"{row['gigabytes_a_second']:6.2f} GB/s"
        )


if __name__ == "__main__":
    main()
