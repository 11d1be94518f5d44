"""Other processes and threads: killed, competing, and filling the disk."""

import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

from picache import ChunkStore
from picache.store import folder_index
from tests.picache.attacks.tally import KEYS, Tally, chunk

ROOM = 6  # chunks that a bound has room for


def bytes_there(folder):
    """Bytes of chunk and temporary files, while no writer renames or deletes any."""
    below, total = folder / "exact" / "ns=", 0
    with closing(sqlite3.connect(below / folder_index.NAME, 30, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        for file in below.rglob("*"):
            if file.suffix in (".safetensors", ".tmp"):
                try:
                    total += file.lstat().st_size
                except FileNotFoundError:
                    continue
        db.execute("ROLLBACK")
    return total


@contextmanager
def bounded_folder():
    """A folder and a bound that has room for `ROOM` chunks."""
    with tempfile.TemporaryDirectory() as base:
        ChunkStore(path=f"{base}/probe").put(KEYS[0], chunk(KEYS[0]))
        (probe,) = Path(base).rglob("*.safetensors")
        folder = Path(base) / "chunks"
        bound = ROOM * (probe.stat().st_size + 16)
        ChunkStore(path=folder, disk_bytes=bound)
        yield folder, bound


def churn(folder, bound, seed, until, counted):
    """Get and put at random until told to stop; what was counted goes into a queue."""
    chance, tally = random.Random(seed), Tally()
    store = tally.run(lambda: ChunkStore(device_bytes=1, path=folder, disk_bytes=bound))
    while not until.is_set():
        key = chance.choice(KEYS)
        (tally.get if chance.random() < 0.6 else tally.put)(store, key)
    counted.put(tally)


def kills(scale, seed):
    """Writers killed at random moments, one after the other, in a folder with a bound."""
    chance, tally = random.Random(seed), Tally()
    with bounded_folder() as (folder, bound):
        for _ in range(max(10, int(100 * scale))):
            child = os.fork()
            if child == 0:
                try:
                    store = ChunkStore(device_bytes=1, path=folder, disk_bytes=bound)
                    while True:
                        key = chance.choice(KEYS)
                        store.put(key, chunk(key))
                finally:
                    os._exit(1)
            time.sleep(chance.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            tally.expect(bytes_there(folder) <= bound, "over the bound after a kill")
            store = tally.run(lambda: ChunkStore(device_bytes=1, path=folder, disk_bytes=bound))
            for key in KEYS:
                tally.get(store, key)
            tally.put(store, chance.choice(KEYS))
            tally.expect(bytes_there(folder) <= bound, "over the bound after a put")
            tally.expect(store.corrupt == 0, "a killed writer left a damaged file")
        store.clear()
        left = [file for file in folder.rglob("*") if file.suffix in (".safetensors", ".tmp")]
        tally.expect(left == [], f"clear left {left}")
    return tally


def processes(scale, seed):
    """Four processes that get, put and evict in one folder, watched all the while."""
    context = multiprocessing.get_context("fork")
    tally, until, counted = Tally(), context.Event(), context.Queue()
    with bounded_folder() as (folder, bound):
        running = [
            context.Process(target=churn, args=(folder, bound, seed + n, until, counted))
            for n in range(4)
        ]
        for process in running:
            process.start()
        end, looks = time.monotonic() + max(3.0, 30 * scale), 0
        while time.monotonic() < end:
            looks += 1
            tally.expect(bytes_there(folder) <= bound, "over the bound")
            time.sleep(0.02)  # nobody writes meanwhile
        until.set()
        for _ in running:
            tally.add(counted.get(timeout=60))
        for process in running:
            process.join()
            tally.expect(process.exitcode == 0, f"a process ended with {process.exitcode}")
        tally.expect(looks > 20, f"looked at {looks} times only")
    return tally


def threads(scale, seed):
    """Eight threads on one store of three small tiers, doing whatever can be done."""
    tally = Tally()
    with bounded_folder() as (folder, bound):
        nbytes = sum(t.nbytes for layer in chunk(KEYS[0]) for t in layer)
        store = ChunkStore(3 * nbytes, 3 * nbytes, folder, disk_bytes=bound)
        until, tallies = threading.Event(), [Tally() for _ in range(8)]

        def work(own, chance):
            while not until.is_set():
                own.anything(store, chance.choice(KEYS), chance)

        running = [
            threading.Thread(target=work, args=(own, random.Random(seed + n)))
            for n, own in enumerate(tallies)
        ]
        for thread in running:
            thread.start()
        end = time.monotonic() + max(3.0, 20 * scale)
        while time.monotonic() < end:
            tally.expect(bytes_there(folder) <= bound, "over the bound on disk")
            for tier in store.stats().tiers:
                tally.expect(tier.nbytes <= tier.budget, f"{tier} is over its bound")
            time.sleep(0.02)
        until.set()
        for thread in running:
            thread.join()
        for own in tallies:
            tally.add(own)
        tally.run(store.clear)
        tally.expect(len(store) == 0 and store.nbytes == 0, "clear left something")
    return tally


def full_disk(scale, seed):
    """A disk of a few chunks and no bound; a file that may not grow."""
    tally, chance = Tally(), random.Random(seed)
    turns = max(60, int(400 * scale))
    with tempfile.TemporaryDirectory() as base:
        mounted = (
            os.getuid() == 0
            and subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", base], capture_output=True
            ).returncode
            == 0
        )
        try:
            if mounted:
                tally.add(fill(Path(base) / "chunks", None, turns, chance))
                tally.add(fill(Path(base) / "bounded", 300_000, turns, chance))
        finally:
            if mounted:
                subprocess.run(["umount", base], check=True)
        child = os.fork()
        if child == 0:
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
                seen = fill(Path(base) / "limited", None, turns, chance)
                os._exit(0 if not seen.failures and not seen.wrong and seen.hits else 3)
            finally:
                os._exit(4)
        _, status = os.waitpid(child, 0)
        tally.expect(status == 0, f"under RLIMIT_FSIZE: {os.waitstatus_to_exitcode(status)}")
        tally.trials += turns
    return tally


def fill(folder, bound, turns, chance):
    """Put more than fits, and get; nothing is lost that is in memory."""
    tally = Tally()
    store = ChunkStore(path=folder, disk_bytes=bound)
    for _ in range(turns):
        key = chance.choice(KEYS)
        tally.put(store, key)
        tally.get(store, key)
    tally.expect(tally.hits == turns, f"{tally.hits} of {turns} chunks in memory were found")
    again = tally.run(lambda: ChunkStore(path=folder))
    for key in KEYS:
        tally.get(again, key)
    tally.expect(not list(folder.rglob("*.tmp")), "temporary files were left")
    return tally
