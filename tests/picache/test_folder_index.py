"""The bound of a folder, whatever other processes, killed writers and the index itself do."""

import os
import sqlite3
import threading
import time
import warnings
from contextlib import closing

import pytest
import torch

from picache import ChunkStore, PICacheError
from picache.chunk import Header
from picache.store import files as stored_files
from picache.store import folder_index, writers
from picache.store.chunk_name import file_name, key_of
from tests.picache.disk_chunks import NAMES, chunk, files, leftovers
from tests.picache.forked import forked
from tests.picache.helpers import same_kv

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes as on POSIX")


def folder_of(path):
    return path / "exact" / "ns="


def size_of_one(tmp_path):
    ChunkStore(path=tmp_path / "probe").put(NAMES[0], chunk())
    (file,) = files(tmp_path / "probe")
    return file.stat().st_size


def bytes_there(path):
    """Bytes of chunk and temporary files, while no writer renames or deletes any."""
    total = 0
    with closing(sqlite3.connect(folder_of(path) / folder_index.NAME, 30)) as db:
        db.isolation_level = None
        db.execute("BEGIN IMMEDIATE")
        for file in [*files(path), *leftovers(path)]:
            try:
                total += file.stat().st_size
            except FileNotFoundError:
                continue
        db.execute("ROLLBACK")
    return total


def tier(store):
    (disk,) = (tier for tier in store.stats().tiers if tier.name == "disk")
    return disk.chunks, disk.nbytes


def filled(path, count, **options):
    store = ChunkStore(device_bytes=1, path=path, **options)
    for seed, key in enumerate(NAMES[:count]):
        store.put(key, chunk(seed))
    return store


def test_a_name_and_its_key_are_one_to_one():
    for key in ("a", "ab", "abc-_9", "k" * 128):
        assert key_of(file_name(key)) == key
    for name in ("ab/cd.safetensors", "ab/abc", "abc.safetensors", "ab/.abc.safetensors", "ab/"):
        assert key_of(name) is None


# The index is never trusted over the files


def garbage(path):
    path.write_bytes(b"garbage" * 1000)


def empty(path):
    path.write_bytes(b"")


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    for place in range(100, len(data), 97):
        data[place] ^= 0xFF
    path.write_bytes(data)


def another_version(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def other_tables(path):
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE files (x)")
        db.commit()


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [os.unlink, garbage, empty, cut_short, flip, another_version, other_tables]
)
@pytest.mark.parametrize("opened_before", [True, False])
def test_a_missing_or_damaged_index_is_made_anew(tmp_path, damage, opened_before):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    store = filled(path, 5, disk_bytes=6 * size)
    damage(folder_of(path) / folder_index.NAME)
    if not opened_before:
        store = ChunkStore(device_bytes=1, path=path, disk_bytes=6 * size)
    assert tier(store) == (5, 5 * size)
    for seed, key in enumerate(NAMES[:5]):
        assert same_kv(store.get(key), chunk(seed))
    for seed in range(5, 9):
        store.put(NAMES[seed], chunk(seed))
    assert tier(store) == (6, 6 * size)
    assert bytes_there(path) == 6 * size
    assert store.failures == {}


def test_an_index_that_cannot_be_made_costs_writes_and_no_reads(tmp_path):
    path = tmp_path / "chunks"
    filled(path, 2)
    a_folder(folder_of(path) / folder_index.NAME)
    with pytest.warns(RuntimeWarning, match="unable to open database file"):
        store = ChunkStore(path=path, disk_bytes=10**6)
    assert same_kv(store.get(NAMES[1]), chunk(1))
    with pytest.warns(RuntimeWarning, match="is not on disk"):
        store.put(NAMES[2], chunk(2))
    assert store.disk_failures == 1
    assert store.get(NAMES[2]).tier == "device"


def test_what_comes_and_goes_behind_the_indexs_back_counts(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    store = filled(path, 4)
    for key in NAMES[:2]:
        (folder_of(path) / file_name(key)).unlink()
    store.clear()
    other = filled(tmp_path / "other", 8)
    for key in NAMES[:8]:  # as a copy by hand
        target = folder_of(path) / file_name(key)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((folder_of(tmp_path / "other") / file_name(key)).read_bytes())
    again = ChunkStore(device_bytes=1, path=path, disk_bytes=6 * size)
    assert tier(again) == (8, 8 * size)
    again.put(NAMES[9], chunk(9))
    assert tier(again) == (6, 6 * size)
    assert len(files(path)) == 6
    assert len(other) == 8


def test_a_file_deleted_by_hand_gives_its_room_back_when_somebody_looks(tmp_path):
    path = tmp_path / "chunks"
    store = filled(path, 3)
    (folder_of(path) / file_name(NAMES[1])).unlink()
    assert store.get(NAMES[1]) is None
    assert tier(ChunkStore(path=path))[0] == 2
    assert tier(store)[0] == 2


def test_a_process_stopped_in_the_index_holds_others_up_once(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_index, "WAIT_SECONDS", 0.3)
    path = tmp_path / "chunks"
    store = filled(path, 3)
    with closing(sqlite3.connect(folder_of(path) / folder_index.NAME)) as db:
        db.isolation_level = None
        db.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        with pytest.warns(RuntimeWarning, match="database is locked"):
            roomy = ChunkStore(path=path)
        with pytest.warns(RuntimeWarning, match=r"was locked for 0\.3 seconds, and is not asked"):
            roomy.put(NAMES[3], chunk(3))
        for seed in range(4, 40):
            roomy.put(NAMES[seed], chunk(seed))
            assert roomy.get(NAMES[50]) is None
        assert time.monotonic() - begun < 5
        assert same_kv(roomy.get(NAMES[1]), chunk(1))
        assert same_kv(store.get(NAMES[1]), chunk(1))
        assert roomy.disk_failures == 37
    monkeypatch.setattr(roomy._disk._index, "_resting_until", 0.0)
    roomy.put(NAMES[3], chunk(3))
    assert tier(roomy)[0] == 4


def test_the_last_use_in_any_process_counts(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    store = filled(path, 4, disk_bytes=4 * size)
    time.sleep(0.02)  # a file's time may be that of a tick
    ChunkStore(path=path).get(NAMES[0])
    store.put(NAMES[4], chunk(4))
    assert [key for key in NAMES[:5] if key in store] == [NAMES[0], *NAMES[2:5]]
    assert store.evictions == 1


def test_by_cost_what_compiles_slowly_stays_across_processes(tmp_path):
    def put(store, key, seconds):
        store.put(key, chunk(), Header(dtype="float32", tokens=5, compile_seconds=seconds))

    put(ChunkStore(path=tmp_path / "probe"), NAMES[0], 4.0)
    size = files(tmp_path / "probe")[0].stat().st_size
    path = tmp_path / "chunks"
    options = dict(path=path, disk_bytes=2 * size + 10, eviction="cost", device_bytes=1)
    put(ChunkStore(**options), NAMES[0], 4.0)
    for key in NAMES[1:5]:  # each loss raises the floor
        put(ChunkStore(**options), key, 1.0)
        assert NAMES[0] in ChunkStore(**options)
    for key in NAMES[5:8]:
        put(ChunkStore(**options), key, 1.0)
    assert NAMES[0] not in ChunkStore(**options)


def test_an_index_does_not_grow_with_what_was_put_and_left(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    store = filled(path, 4, disk_bytes=4 * size)
    index = folder_of(path) / folder_index.NAME
    before = index.stat().st_size
    for seed in range(200):
        store.put(NAMES[seed % 100], chunk(seed))
    assert index.stat().st_size <= before + 20_000
    assert tier(store) == (4, 4 * size)


# Killed writers


def in_fill(stop):
    write = stored_files._write
    stored_files._write = lambda *given: (write(*given), stop())


def before_fill(stop):
    stored_files._write = lambda *given: stop()


def after_rename(stop):
    stored_files.LocalFiles.settle = lambda *given: stop()


def in_publish(stop):
    publish = stored_files.LocalFiles.publish
    stored_files.LocalFiles.publish = lambda *given: (publish(*given), os.kill(os.getpid(), 9))


def writer(path, bound, patch):
    """A process that stops in the middle of a put, where `patch` says."""

    def work(stop):
        store = ChunkStore(path=path, disk_bytes=bound)
        patch(stop)
        store.put(NAMES[50], chunk())

    return forked(work)


@pytest.mark.parametrize("patch", [in_fill, before_fill, after_rename, in_publish])
def test_a_killed_writers_room_counts_at_once_and_goes_to_whoever_needs_it(tmp_path, patch):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    bound = 4 * size + 10
    store = filled(path, 3, disk_bytes=bound)
    process = writer(path, bound, patch)
    if patch != in_publish:
        assert process.line() == b"there\n"
        assert tier(store)[1] == 4 * size, "what is being written counts"
        process.kill()
    assert process.wait() == -9
    assert tier(store)[1] == 4 * size
    for seed in range(3, 12):
        store.put(NAMES[seed], chunk(seed))
        assert bytes_there(path) <= bound
    assert leftovers(path) == []
    assert tier(store) == (4, 4 * size)
    assert len(files(path)) == 4
    assert store.failures == {}


def test_a_live_writers_file_is_left_alone_and_its_room_too(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    bound = 4 * size
    store = filled(path, 3, disk_bytes=bound)
    process = writer(path, bound, in_fill)
    try:
        assert process.line() == b"there\n"
        old = time.time() - 2 * writers.STALE_SECONDS
        (temporary,) = leftovers(path)
        os.utime(temporary, (old, old))
        ChunkStore(path=path, disk_bytes=bound)
        for seed in range(3, 9):
            store.put(NAMES[seed], chunk(seed))
            assert bytes_there(path) <= bound
        assert leftovers(path) == [temporary]
        assert tier(store) == (3, 4 * size)
    finally:
        process.go_on()
        assert process.wait() == 0
    assert NAMES[50] in store
    assert leftovers(path) == []


def test_clear_takes_what_killed_writers_left(tmp_path):
    path = tmp_path / "chunks"
    store = filled(path, 3)
    process = writer(path, 10**6, in_fill)
    assert process.line() == b"there\n"
    process.kill()
    process.wait()
    assert len(leftovers(path)) == 1
    store.clear()
    assert leftovers(path) == files(path) == []
    assert tier(store) == (0, 0)


def test_another_machines_leftover_counts_and_goes_by_its_age(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    filled(path, 3)
    stranger = folder_of(path) / f".x.{2 * size}.deadbeef-1-1.{'0' * 32}.tmp"
    stranger.write_bytes(b"x")
    store = ChunkStore(device_bytes=1, path=path, disk_bytes=4 * size)
    assert tier(store)[1] == 4 * size, "it may grow to what its name says"
    store.put(NAMES[7], chunk(7))
    assert stranger.exists()
    old = time.time() - 2 * writers.STALE_SECONDS
    os.utime(stranger, (old, old))
    for seed in (8, 9):
        store.put(NAMES[seed], chunk(seed))
    assert not stranger.exists()
    assert tier(store) == (4, 4 * size)


def test_a_zombie_has_ended():
    child = os.fork()
    if child == 0:
        os._exit(0)
    name = writers.temporary_name("x", 5).replace(f"-{os.getpid()}-", f"-{child}-")
    time.sleep(0.1)
    assert writers.abandoned(name, 0.0)
    os.waitpid(child, 0)
    assert writers.abandoned(name, 0.0)
    assert writers.reserved_bytes(name) == 5


# At the same time


def sampled(path, bound, until):
    """The most bytes ever there until `until` is set, and how often that was looked at."""
    most = looks = 0
    while not until.wait(0.001):  # not always at once: it keeps the others from the index
        most, looks = max(most, bytes_there(path)), looks + 1
    return most, looks


def watched(path, bound, work):
    """Run `work` while another thread watches the folder; the most bytes ever there."""
    until, seen = threading.Event(), []
    watcher = threading.Thread(target=lambda: seen.append(sampled(path, bound, until)))
    watcher.start()
    try:
        work()
    finally:
        until.set()
        watcher.join()
    ((most, looks),) = seen
    assert looks > 10
    return most


def test_threads_do_not_pass_the_bound(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    bound = 5 * size
    store = ChunkStore(device_bytes=1, path=path, disk_bytes=bound)
    failed = []

    def puts(offset):
        for turn in range(25):
            key = NAMES[(offset + turn * 7) % 20]
            try:
                store.put(key, chunk())
            except PICacheError as error:  # all room may be reserved by the others
                if "does not fit" not in str(error):
                    failed.append(error)

    def work():
        threads = [threading.Thread(target=puts, args=(3 * n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert watched(path, bound, work) <= bound
    assert failed == []
    assert tier(store)[1] <= bound
    assert tier(store)[1] == bytes_there(path)
    assert leftovers(path) == []


def test_processes_do_not_pass_the_bound_even_when_they_are_killed(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    bound = 6 * size
    ChunkStore(path=path, disk_bytes=bound)

    def putter(offset):
        def puts(stop):
            stop()  # until the watcher is there
            warnings.simplefilter("ignore")
            store = ChunkStore(path=path, disk_bytes=bound)
            for turn in range(30 if offset % 2 else 10**6):
                store.put(NAMES[(offset + turn * 7) % 20], chunk())

        return forked(puts)

    running = [putter(offset) for offset in range(4)]

    def work():
        for process in running:
            assert process.line() == b"there\n"
            process.go_on()
        for process in running[1::2]:
            assert process.wait() == 0
        for process in running[::2]:
            process.kill()
            assert process.wait() == -9

    assert watched(path, bound, work) <= bound
    store = ChunkStore(device_bytes=1, path=path, disk_bytes=bound)
    for seed in range(20, 30):
        store.put(NAMES[seed], chunk(seed))
    assert bytes_there(path) == 6 * size
    assert leftovers(path) == []


def test_chunks_in_use_keep_their_room_and_the_bound_is_kept_again_afterwards(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    store = ChunkStore(device_bytes=1, path=path, disk_bytes=3 * size)
    for seed, key in enumerate(NAMES[:3]):
        store.put(key, chunk(seed))
    with store.using(NAMES[:3]):
        with (
            pytest.warns(RuntimeWarning, match="do not fit disk_bytes"),
            pytest.raises(PICacheError, match="does not fit"),
        ):
            store.put(NAMES[5], chunk(5))
        ChunkStore(path=path).put(NAMES[6], chunk(6))  # without a bound
        assert all(key in store for key in NAMES[:3])
    assert bytes_there(path) == 3 * size
    assert NAMES[6] in store


def test_a_key_put_again_needs_no_room_but_its_own(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    store = ChunkStore(path=path, disk_bytes=size)
    for seed in range(3):
        store.put(NAMES[0], chunk(seed))
        assert bytes_there(path) == size
        assert same_kv(ChunkStore(path=path).get(NAMES[0]), chunk(seed))
    assert store.failures == {}


def test_tenants_and_storages_have_bounds_of_their_own(tmp_path):
    size = size_of_one(tmp_path)
    path = tmp_path / "chunks"
    one = filled(path, 4, disk_bytes=2 * size + 200, namespace="one")
    two = filled(path, 4, disk_bytes=3 * size + 200, namespace="two")
    assert (tier(one)[0], tier(two)[0]) == (2, 3)
    one.clear()
    assert (tier(one)[0], tier(two)[0]) == (0, 3)


def test_a_put_and_an_opening_cost_no_listing(tmp_path, monkeypatch):
    path = tmp_path / "chunks"
    size = size_of_one(tmp_path)
    store = filled(path, 60, disk_bytes=60 * size)
    listed = []
    original = folder_index.FolderIndex._list

    def counting(self, db, shard):
        listed.append(shard)
        return original(self, db, shard)

    monkeypatch.setattr(folder_index.FolderIndex, "_list", counting)
    for seed in range(60, 80):
        store.put(NAMES[seed], chunk(seed))
    store.get(NAMES[70])
    again = ChunkStore(path=path, disk_bytes=60 * size)
    assert len(again) == 60
    assert listed == []
    assert torch.is_tensor(again.get(NAMES[70]).layer(0)[0])
