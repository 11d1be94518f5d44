"""Processes that share a chunk store behind a URL: the same keys at once, and one of them killed.

"file://" is the local folder, which has a lock; "local://" is the same file system through fsspec,
where a store knows of others only by what it lists, as on any other URL. A local folder and all
that can fail there: `tests.picache.attacks`.
"""

import multiprocessing
import os
import random
import signal
import time

import pytest

from picache import ChunkStore
from picache.errors import CorruptChunk
from tests.picache.attacks.tally import KEYS, Tally, chunk

SHARED = KEYS[:6]
KILLS = 12


def churn(url, seed, until, counted):
    """Put and get the shared keys until told to stop."""
    chance, tally = random.Random(seed), Tally()
    store = ChunkStore(device_bytes=1, path=url)
    while not until.is_set():
        key = chance.choice(SHARED)
        (tally.get if chance.random() < 0.6 else tally.put)(store, key)
    tally.expect(store.corrupt == 0, f"{store.corrupt} damaged files were read")
    counted.put(tally)


def write_until_killed(url, seed):
    chance, store = random.Random(seed), ChunkStore(device_bytes=1, path=url)
    while True:
        key = chance.choice(SHARED)
        store.put(key, chunk(key))


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_processes_share_a_store_and_one_is_killed(scheme, tmp_path):
    url = f"{scheme}{tmp_path}/chunks"
    ChunkStore(path=url)  # makes the folder
    context = multiprocessing.get_context("fork")
    until, counted = context.Event(), context.Queue()
    workers = [context.Process(target=churn, args=(url, seed, until, counted)) for seed in range(2)]
    for worker in workers:
        worker.start()
    chance = random.Random(7)
    for kill in range(KILLS):
        victim = context.Process(target=write_until_killed, args=(url, 100 + kill))
        victim.start()
        time.sleep(chance.uniform(0.05, 0.3))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    until.set()
    total = Tally()
    for _ in workers:
        total.add(counted.get(timeout=60))
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert total.failures == []
    assert total.wrong == 0
    assert total.hits > 50
    left = Tally()
    store = ChunkStore(device_bytes=1, path=url)
    for key in SHARED:
        left.get(store, key)
    assert (left.hits, left.wrong, left.failures) == (len(SHARED), 0, [])
    assert store.corrupt == 0


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_a_reader_keeps_what_another_deletes_and_replaces(scheme, tmp_path):
    """A chunk that is found is read to its end, or is a miss; never a mixture."""
    url = f"{scheme}{tmp_path}/chunks"
    reader = ChunkStore(device_bytes=1, path=url)
    reader.put(SHARED[0], chunk(SHARED[0]))
    context = multiprocessing.get_context("fork")
    until = context.Event()
    other = context.Process(target=_delete_and_put, args=(url, until))
    other.start()
    tally = Tally()
    end = time.monotonic() + 3.0
    while time.monotonic() < end:
        tally.get(reader, SHARED[0])
    until.set()
    other.join()
    assert (tally.wrong, tally.failures) == (0, [])
    assert tally.hits > 20
    assert other.exitcode == 0


def _delete_and_put(url, until):
    store = ChunkStore(device_bytes=1, path=url)
    while not until.is_set():
        store.clear()
        try:
            store.put(SHARED[0], chunk(SHARED[0]))
        except CorruptChunk:
            os._exit(1)
