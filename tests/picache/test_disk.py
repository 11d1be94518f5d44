"""The disk tier: damage of any kind is found, and what is found damaged is never used."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from picache import ChunkStore, PICacheError
from picache.errors import CorruptChunk
from picache.store import disk
from picache.store.chunkfile import FORMAT, _bytes, _checksum, _seal
from picache.store.files import MARKED, MARKER, STALE_SECONDS
from tests.picache.disk_chunks import KEY, OTHER, chunk, files, leftovers
from tests.picache.forked import forked
from tests.picache.helpers import same_kv

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """A store on disk with one chunk, as another process would find it."""
    ChunkStore(path=tmp_path / "chunks").put(KEY, chunk())
    return tmp_path / "chunks"


def test_a_chunk_outlives_the_store_to_the_bit(folder):
    store = ChunkStore(path=folder)
    assert KEY in store
    assert len(store) == 1
    found = store.get(KEY)
    assert (found.tier, found.num_layers, found.header.tokens) == ("disk", 3, 5)
    assert same_kv(found, chunk())
    assert store.get(OTHER) is None
    assert (store.hits, store.misses, store.corrupt) == (1, 1, 0)


def test_a_file_is_plain_safetensors_that_others_can_read(folder):
    (path,) = files(folder)
    assert path.name == f"{KEY}.safetensors"
    assert torch.equal(load_file(path)["1.values"], chunk()[1][1])
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == FORMAT
        assert json.loads(file.metadata()["header"])["tokens"] == 5


def read(folder, key=KEY):
    """What a store gives: the tensors, or None where it refuses."""
    store = ChunkStore(path=folder)
    try:
        found = store.get(key)
        loaded = None if found is None else found.load()
    except CorruptChunk as error:
        assert key in str(error)  # noqa: PT017 - both outcomes are right
        loaded = None
    if loaded is None:
        assert store.corrupt == 1
        assert key not in store
        assert store.get(key) is None
        store.put(key, chunk())  # compiled again
        assert same_kv(store.get(key), chunk())
    return loaded


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_never_used(folder, part):
    (path,) = files(folder)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert read(folder) is None


@pytest.mark.parametrize("more", [b"\0", b"x" * 1000])
def test_a_file_with_something_after_its_end_is_never_used(folder, more):
    (path,) = files(folder)
    path.write_bytes(path.read_bytes() + more)
    assert read(folder) is None


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_flipped_bit_or_a_cut_anywhere_never_gives_other_tensors(folder, where, bit, cut):
    (path,) = files(folder)
    good = path.read_bytes()
    data = bytearray(good)
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(good[: int(where * len(good))] if cut else data)
    store = ChunkStore(path=folder)
    try:
        found = store.get(KEY)
        assert found is None or (not cut and same_kv(found.load(), chunk()))
    except CorruptChunk:
        assert KEY not in store
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(good)


def test_every_bit_of_a_layer_counts(folder):
    (path,) = files(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last byte is of a tensor, whatever the header's length
    path.write_bytes(data)
    assert read(folder) is None


def test_layers_before_the_damage_are_given_and_the_damaged_one_is_not(folder):
    (path,) = files(folder)
    with safe_open(path, framework="pt") as file:
        names = list(file.offset_keys())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = int(names[-1][0])
    store = ChunkStore(path=folder)
    found = store.get(KEY)
    for index in set(range(3)) - {damaged}:
        assert same_kv([found.layer(index)], chunk()[index : index + 1])
    with pytest.raises(CorruptChunk, match=f"fails the checksum of layer {damaged}"):
        found.layer(damaged)
    assert KEY not in store
    assert not files(folder)


def test_a_file_cut_short_while_it_is_mapped_is_an_error_and_not_a_dead_process(folder):
    found = ChunkStore(path=folder).get(KEY)
    (path,) = files(folder)
    os.truncate(path, 100)
    with pytest.raises(CorruptChunk, match="cut short"):
        found.layer(0)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_file_written_again_since_a_reader_found_damage_is_not_deleted(folder):
    (path,) = files(folder)
    damage(path)
    slow, quick = ChunkStore(path=folder), ChunkStore(path=folder)
    found = slow.get(KEY)
    with pytest.raises(CorruptChunk):
        quick.get(KEY).load()
    for _ in range(2):  # the second may take the inode that the first one freed
        quick.put(KEY, chunk())
    with pytest.raises(CorruptChunk):
        found.load()
    assert same_kv(slow.get(KEY), chunk())
    assert (slow.corrupt, quick.corrupt, len(slow)) == (1, 1, 1)
    damage(path)  # the next damage is again deleted
    with pytest.raises(CorruptChunk):
        slow.get(KEY).load()
    assert not files(folder)
    assert len(slow) == 0


def test_a_file_written_again_while_it_is_opened_is_not_deleted(folder, monkeypatch):
    (path,) = files(folder)
    os.truncate(path, 100)
    original = disk.ChunkFile

    def opened(*args):
        try:
            return original(*args)
        except CorruptChunk:
            for turn in range(5):  # another reader compiled it; freed inodes are taken again
                ChunkStore(path=folder).put(KEY, chunk(turn))
            raise

    store = ChunkStore(path=folder)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "ChunkFile", opened)
        assert store.get(KEY) is None
    assert store.corrupt == 1
    assert same_kv(store.get(KEY), chunk(4))


def test_a_remote_file_written_again_since_is_not_deleted():
    pytest.importorskip("fsspec")
    url = f"memory://picache-{uuid.uuid4().hex}/chunks"
    ChunkStore(path=url).put(KEY, chunk())
    slow, quick = ChunkStore(path=url), ChunkStore(path=url)
    remote = slow._disk._files
    name = f"{remote._root}/{KEY[:2]}/{KEY}.safetensors"
    data = bytearray(remote._fs.cat_file(name))
    data[-1] ^= 1
    remote._fs.pipe_file(name, bytes(data))
    found = slow.get(KEY)
    quick.put(KEY, chunk())
    with pytest.raises(CorruptChunk):
        found.load()
    assert same_kv(slow.get(KEY), chunk())


def test_a_file_deleted_or_replaced_while_it_is_mapped_stays_readable(folder):
    store = ChunkStore(path=folder)
    found = store.get(KEY)
    store.clear()
    assert not files(folder)
    assert same_kv(found, chunk())
    store.put(KEY, chunk())
    assert same_kv(found, chunk())


def test_a_file_under_another_key_is_refused(folder):
    (path,) = files(folder)
    renamed = folder / "exact" / "ns=" / OTHER[:2] / f"{OTHER}.safetensors"
    renamed.parent.mkdir()
    shutil.copy(path, renamed)
    assert read(folder, OTHER) is None
    assert same_kv(read(folder), chunk())


@pytest.mark.parametrize("source", [{"namespace": "tenant"}, {"storage": "int8"}])
def test_a_file_of_another_tenant_or_storage_is_not_seen_and_if_copied_refused(folder, source):
    shutil.rmtree(folder)
    ChunkStore(path=folder, **source).put(KEY, chunk())
    store = ChunkStore(path=folder)
    assert KEY not in store
    assert store.get(KEY) is None
    assert (len(store), store.corrupt) == (0, 0)
    (path,) = files(folder)
    target = folder / "exact" / "ns=" / KEY[:2] / path.name
    target.parent.mkdir()
    shutil.copy(path, target)
    assert store.get(KEY) is None
    assert store.corrupt == 1
    assert ChunkStore(path=folder, **source).get(KEY) is not None


def test_tenants_cannot_reach_out_of_their_folder(tmp_path):
    for namespace in ("../x", "..", ".", "a/b", "a%2Fb", "é"):
        ChunkStore(path=tmp_path / "chunks", namespace=namespace).put(KEY, chunk())
    assert len(files(tmp_path / "chunks" / "exact")) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["chunks"]
    with pytest.raises(PICacheError, match="at most 197"):
        ChunkStore(path=tmp_path / "chunks", namespace="n" * 300)
    store = ChunkStore(path=tmp_path / "chunks")
    for key in ("../../x", "", "a/b", ".hidden", "k" * 200):
        with pytest.raises(PICacheError, match="cannot name a file"):
            store.put(key, chunk())
    assert len(store) == 0
    assert store.nbytes == 0


def rewrite(path, change, seal=True):
    """Write the file again with other metadata, as another program would."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(metadata, tensors)
    if seal:
        metadata["checksum"] = _seal(metadata)
    save_file(tensors, path, metadata=metadata)


def set_header(**fields):
    def change(metadata, tensors):
        metadata["header"] = json.dumps({**json.loads(metadata["header"]), **fields})

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda m, t: m.update(format="picache-chunk/1"),
        lambda m, t: m.clear(),
        lambda m, t: m.pop("checksums"),
        lambda m, t: m.update(checksums="[1"),
        lambda m, t: m.update(checksums="7"),
        lambda m, t: m.update(header="[]"),
        lambda m, t: t.pop("1.keys"),
        lambda m, t: t.update({"9.keys": torch.zeros(3)}),
        lambda m, t: t.update({"1.keys": torch.zeros_like(t["1.keys"])}),
        lambda m, t: t.update({"1.keys": t["1.values"], "1.values": t["1.keys"]}),
        lambda m, t: t.update({"1.keys": t["1.keys"].view(torch.int32)}),
        lambda m, t: t.update({"1.keys": t["1.keys"].reshape(1, 1, 5, 8)}),
        set_header(dtype="int4"),
        set_header(dtype="bfloat16"),
        set_header(tokens=6),
        set_header(unknown=1),
        set_header(namespace="tenant"),
    ],
)
def test_a_file_whose_header_does_not_go_with_its_tensors_is_refused(folder, change):
    (path,) = files(folder)
    rewrite(path, change)
    assert read(folder) is None


def test_a_header_changed_without_its_checksum_is_refused(folder):
    (path,) = files(folder)
    rewrite(path, set_header(revision="other"), seal=False)
    assert read(folder) is None
    (path,) = files(folder)
    rewrite(path, lambda m, t: None)  # what the two tests above change is what they find
    assert same_kv(read(folder), chunk())


def test_a_file_of_the_format_before_is_still_read_and_checked(folder):
    def as_before(metadata, tensors):
        before = "picache-chunk/2"
        layers = [{p: tensors[f"{i}.{p}"] for p in ("keys", "values")} for i in range(3)]
        read = [{name: (part, _bytes(part)) for name, part in layer.items()} for layer in layers]
        sums = [_checksum(layer, before) for layer in read]
        assert all(len(each) == 64 for each in sums), "SHA-256"
        metadata.update(format=before, checksums=json.dumps(sums))

    (path,) = files(folder)
    rewrite(path, as_before)
    assert same_kv(read(folder), chunk())
    damage(path)
    with pytest.raises(CorruptChunk, match="fails the checksum"):
        ChunkStore(path=folder).get(KEY).load()


def test_a_pickle_under_the_name_of_a_chunk_is_not_opened(folder):
    class Bomb:
        def __reduce__(self):
            return (os._exit, (3,))

    (path,) = files(folder)
    torch.save(Bomb(), path)
    assert read(folder) is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_reading_does_not_add_up_to_memory(folder):
    """safetensors 0.8.0 loses 64 bytes with every tensor that `get_tensor` gives.

    In a process of its own: here others' memory comes and goes.
    """
    code = f"""
        import os
        import torch
        from pathlib import Path
        from picache import ChunkStore

        def resident():
            pages = Path("/proc/self/statm").read_text().split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")

        torch.set_num_threads(1)
        found = ChunkStore(path={str(folder)!r}).get({KEY!r})
        for turn in range(3500):
            found.load()
            before = resident() if turn == 1000 else 0 if turn == 0 else before
        print(resident() - before)
    """
    grown = subprocess.check_output([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    assert int(grown) < 500_000, "15,000 tensors were read"


# What is no chunk store


def test_a_path_that_is_no_chunk_store_is_refused_by_name(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(PICacheError, match=r"foreign is not a chunk store: it holds 'thesis.tex'"):
        ChunkStore(path=foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(PICacheError, match=r"cannot keep chunks in .*thesis.tex"):
        ChunkStore(path=foreign / "thesis.tex")
    with pytest.raises(PICacheError, match=r"cannot keep chunks in .*thesis.tex"):
        ChunkStore(path=foreign / "thesis.tex" / "below")


def test_another_format_version_is_refused_and_left_alone(folder):
    marker = json.loads((folder / MARKER).read_text())
    for version in (MARKED["version"] - 1, MARKED["version"] + 1):
        (folder / MARKER).write_text(json.dumps({**marker, "version": version}))
        with pytest.raises(PICacheError, match=f"'version': {version}"):
            ChunkStore(path=folder)
    (folder / MARKER).write_bytes(b"\xff\x00")
    with pytest.raises(PICacheError, match=MARKER):
        ChunkStore(path=folder)
    assert len(files(folder)) == 1


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
def test_a_folder_that_cannot_be_written_to_is_refused():
    def opens(stop):
        os.getuid() or os.setuid(65534)  # root may write anywhere
        with pytest.raises(PICacheError, match=r"cannot keep chunks in .*Permission denied"):
            ChunkStore(path=path)

    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: only its owner may enter that
        path = Path(folder) / "chunks"
        ChunkStore(path=path).put(KEY, chunk())
        locked = path / "exact" / "ns="
        Path(folder).chmod(0o755)
        locked.chmod(0o555)
        status = forked(opens).wait()
        locked.chmod(0o755)
    assert status == 0


# Full disks


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_costs_a_warning_and_no_chunk(folder, monkeypatch, call):
    store = ChunkStore(path=folder)
    monkeypatch.setattr(os, call, full)
    with pytest.warns(RuntimeWarning, match="No space left on device") as warned:
        store.put(OTHER, chunk(1))
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put("ef" + OTHER, chunk(2))
    assert store.disk_failures == 2
    assert same_kv(store.get(OTHER), chunk(1))
    assert store.get(OTHER).tier == "device"
    assert len(files(folder)) == 1
    assert leftovers(folder) == []
    monkeypatch.undo()
    store.put(OTHER, chunk(1))
    assert same_kv(ChunkStore(path=folder).get(OTHER), chunk(1))


def test_a_chunk_that_fits_neither_memory_nor_a_full_disk_is_refused(folder, monkeypatch):
    store = ChunkStore(device_bytes=10, path=folder)
    store.put(OTHER, chunk(1))
    assert store.get(OTHER).tier == "disk"
    store.clear()
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning), pytest.raises(PICacheError, match="does not fit"):
        store.put(OTHER, chunk(1))
    assert len(store) == 0
    assert leftovers(folder) == []


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_a_file_the_system_refuses_to_let_grow_leaves_nothing(tmp_path):
    def puts(stop):
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = ChunkStore(path=tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        warnings.simplefilter("ignore")
        store.put("small", [(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))])
        store.put("large", [(torch.ones(1, 1, 400, 64), torch.ones(1, 1, 400, 64))])
        assert store.disk_failures == 1, store
        assert store.get("large").tier == "device"

    assert forked(puts).wait() == 0
    assert [path.stem for path in files(tmp_path)] == ["small"]
    assert leftovers(tmp_path) == []


def test_disk_bytes_bounds_the_folder_and_the_oldest_file_leaves(tmp_path):
    ChunkStore(path=tmp_path / "one").put(KEY, chunk())
    (one,) = files(tmp_path / "one")
    size = one.stat().st_size
    keys = [f"{i}" * 8 for i in range(5)]
    path = tmp_path / "chunks"
    store = ChunkStore(path=path, disk_bytes=3 * size)
    for index, key in enumerate(keys[:3]):
        store.put(key, chunk(index))
        os.utime(files(path)[index], (index, index))
    again = ChunkStore(path=path, disk_bytes=3 * size)
    again.get(keys[0])
    ChunkStore(path=path).put(keys[3], chunk(3))  # another process fills the same folder
    again.put(keys[4], chunk(4))
    assert sum(file.stat().st_size for file in files(path)) <= 3 * size
    assert keys[1] not in again
    assert keys[4] in again
    tiny = ChunkStore(path=path, disk_bytes=size)
    assert len(files(path)) == 1
    with tiny.using(file.stem for file in files(path)):
        (stays,) = files(path)
        with pytest.warns(RuntimeWarning, match="do not fit disk_bytes"):
            tiny.put(KEY, chunk())
        assert files(path) == [stays]
    with pytest.warns(RuntimeWarning, match="do not fit disk_bytes"):
        ChunkStore(path=path, disk_bytes=size).put(KEY, chunk(tokens=500))
    assert files(path) == [stays]


# Other processes


def test_another_process_s_new_chunk_is_found_and_a_deleted_one_is_a_miss(folder):
    store = ChunkStore(path=folder)
    ChunkStore(path=folder).put(OTHER, chunk(1))
    assert OTHER in store
    assert same_kv(store.get(OTHER), chunk(1))
    ChunkStore(path=folder).clear()
    assert store.get(OTHER) is None
    assert (store.corrupt, len(store)) == (0, 0)  # KEY is known to be gone: they share an index
    assert store.get(KEY) is None
    assert len(store) == 0


def writer(path):
    """A process that puts one key again and again, others in between."""

    def puts(stop):
        store, kv = ChunkStore(path=path), chunk(0, tokens=500, layers=8)
        stop()
        for turn in range(60):
            store.put(KEY, kv)
            store.put(f"{turn % 7}" * 8, chunk(turn % 7))

    return forked(puts)


def check_everything(path):
    store = ChunkStore(path=path)
    expected = {KEY: chunk(0, tokens=500, layers=8)} | {f"{i}" * 8: chunk(i) for i in range(7)}
    held = [key for key in expected if key in store]
    for key in held:
        found = store.get(key)
        assert found is not None, f"{key} was there but damaged"
        assert same_kv(found, expected[key])
    assert store.corrupt == 0
    return held


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked writers")
def test_a_writer_killed_at_any_moment_leaves_whole_files_only(tmp_path):
    """Forked, so that many can be killed; the child only writes."""
    path, seen, left = tmp_path / "chunks", set(), 0
    kv = chunk(0, tokens=500, layers=8)
    chance = random.Random(0)
    begun = time.perf_counter()
    ChunkStore(path=path).put(KEY, kv)
    long = max(0.05, 2 * (time.perf_counter() - begun))  # on a machine that is busy, too
    for _ in range(40):
        child = os.fork()
        if child == 0:  # in the child nothing may return to pytest
            try:
                store = ChunkStore(path=path)
                while True:
                    store.put(KEY, kv)
                    for turn in range(7):
                        store.put(f"{turn}" * 8, chunk(turn))
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.0, long))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen |= set(check_everything(path))
        left = len(leftovers(path))
    assert KEY in seen
    assert left > 0, "no writer was killed while writing: the test shows nothing"
    old = time.time() - STALE_SECONDS - 1
    for temporary in leftovers(path)[1:]:
        os.utime(temporary, (old, old))
    ChunkStore(path=path)
    assert len(leftovers(path)) == 1  # a live writer's file is young
    check_everything(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks writers")
def test_two_processes_write_one_key_while_a_third_reads(tmp_path):
    writers = [writer(tmp_path) for _ in range(2)]
    for process in writers:
        assert process.line() == b"there\n"
        process.go_on()
    store, expected, reads = ChunkStore(path=tmp_path), chunk(0, tokens=500, layers=8), 0
    ended: list[int] = []
    waiting = threading.Thread(target=lambda: ended.extend(each.wait() for each in writers))
    waiting.start()
    while waiting.is_alive():
        found = store.get(KEY)
        if found is not None:
            assert same_kv(found, expected)
            reads += 1
    assert ended == [0, 0]
    assert reads > 0
    assert store.corrupt == 0
    assert len(check_everything(tmp_path)) == 8
    assert leftovers(tmp_path) == []


def test_threads_share_a_store(tmp_path):
    store = ChunkStore(device_bytes=3000, host_bytes=3000, path=tmp_path)
    keys, wrong = [f"{i}" * 8 for i in range(8)], []

    def work(seed):
        chance = random.Random(seed)
        try:
            for _ in range(40):
                index = chance.randrange(8)
                with store.using([keys[index]]):
                    found = store.get(keys[index])
                    if found is None:
                        store.put(keys[index], chunk(index))
                    elif not same_kv(found, chunk(index)):
                        wrong.append(index)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for tier in store.stats().tiers:
        assert tier.nbytes <= tier.budget
    assert len(store) == 8


# fsspec URLs


def test_a_memory_url_keeps_chunks_and_finds_damage():
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://picache-{uuid.uuid4().hex}/chunks"
    store = ChunkStore(path=url)
    store.put(KEY, chunk())
    store.put(OTHER, chunk(1))
    again = ChunkStore(path=url)
    assert len(again) == 2
    assert same_kv(again.get(KEY), chunk())
    filesystem = fsspec.filesystem("memory")
    (path,) = (p for p in filesystem.find(url.removeprefix("memory:/")) if KEY in p)
    data = bytearray(filesystem.cat_file(path))
    data[-1] ^= 1
    filesystem.pipe_file(path, bytes(data))
    with pytest.raises(CorruptChunk):
        again.get(KEY).load()
    assert KEY not in again
    assert not filesystem.exists(path)
    assert len(ChunkStore(path=url, namespace="tenant")) == 0
    again.clear()
    assert len(ChunkStore(path=url)) == 0


def test_a_url_that_holds_something_else_or_cannot_be_opened_is_refused(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    name = f"picache-{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe_file(f"/{name}/thesis.tex", b"x")
    with pytest.raises(PICacheError, match=r"is not a chunk store: it holds 'thesis.tex'"):
        ChunkStore(path=f"memory://{name}")
    with pytest.raises(PICacheError, match="nosuch://x"):
        ChunkStore(path="nosuch://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(PICacheError, match=r"pip install picache\[storage\]"):
        ChunkStore(path=f"memory://{name}")


def test_a_url_of_a_full_file_system_costs_a_warning(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://picache-{uuid.uuid4().hex}"
    store = ChunkStore(path=url)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "mv", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        store.put(KEY, chunk())
    assert store.get(KEY).tier == "device"
    assert not [p for p in fsspec.filesystem("memory").find(url[8:]) if KEY in p]


def test_a_file_url_is_the_local_path(tmp_path):
    ChunkStore(path=f"file://{tmp_path}/chunks").put(KEY, chunk())
    assert same_kv(ChunkStore(path=tmp_path / "chunks").get(KEY), chunk())


def test_a_local_path_does_without_fsspec(tmp_path):
    code = f"""
        import sys
        import torch
        sys.modules["fsspec"] = None
        from picache import ChunkStore
        ChunkStore(path={str(tmp_path)!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_chunks_used_in_quick_succession_go_in_the_order_of_their_use(tmp_path):
    """A file system's own stamps are equal for uses a few milliseconds apart."""
    store = ChunkStore(device_bytes=1, path=tmp_path)
    keys = [f"{n:02x}{n}" for n in range(20)]
    for key in keys:
        store.put(key, chunk(seed=1))
    used = sorted(keys, key=lambda key: key[::-1])
    for key in used:
        store.get(key)
    times = {file.name.split(".")[0]: file.stat().st_mtime_ns for file in files(tmp_path)}
    assert sorted(keys, key=times.__getitem__) == used
    assert len(set(times.values())) == len(keys)
