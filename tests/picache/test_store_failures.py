"""A cache may lose, it may not fail the request: whatever a tier raises, a link goes on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import uuid
import warnings
from pathlib import Path

import pytest
import torch

from picache import PIC, ChunkStore, LegoLink, PICacheError
from picache.errors import CorruptChunk, StoreUnavailable
from picache.store import chunkfile, files, folder_index
from tests.helpers import random_ids, tiny_model
from tests.picache.disk_chunks import KEY, OTHER, chunk
from tests.picache.helpers import same_kv
from tests.picache.test_disk import rewrite, set_header

ROOT = Path(__file__).parents[2]
LENGTHS = (9, 30, 21)
TEXTS = [random_ids(n, seed=n) for n in LENGTHS]
QUERY = random_ids(4, seed=4)


class ClientError(Exception):
    """As botocore and aiohttp have them: no OSError."""


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(model):
    pic = PIC(model)
    return pic.link([pic.compile(text) for text in TEXTS], QUERY, LegoLink(3)).logits


@pytest.fixture(scope="module")
def compiled(model, tmp_path_factory):
    """A folder with the three chunks, which no test changes."""
    folder = tmp_path_factory.mktemp("compiled")
    pic = PIC(model, store=ChunkStore(path=folder))
    return folder, [pic.compile(text) for text in TEXTS]


@pytest.fixture
def filled(compiled, tmp_path):
    """A folder with the three chunks, as another process left it."""
    folder, chunks = compiled
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path, list(chunks)


def linked(model, store, chunks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return PIC(model, store=store).link(chunks, QUERY, LegoLink(3))


def path_of(folder, key):
    (path,) = folder.rglob(f"{key}.safetensors")
    return path


# A file that goes away, at every moment of its use


def test_a_file_deleted_after_its_header_was_read_is_read_to_its_end(
    model, expected, filled, monkeypatch
):
    folder, chunks = filled
    original = torch.UntypedStorage.from_file

    def unlinked(name, *args, **kwargs):
        os.unlink(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", unlinked)
    read = chunkfile.ChunkFile.layers

    paths = list(folder.rglob("*.safetensors"))

    def after_a_neighbour(self, layers):  # called by several threads
        for path in paths:
            path.unlink(missing_ok=True)
        return read(self, layers)

    monkeypatch.setattr(chunkfile.ChunkFile, "layers", after_a_neighbour)
    prompt = linked(model, ChunkStore(path=folder), chunks)
    assert torch.equal(prompt.logits, expected)
    assert all(prompt.report.chunk_hits)


def test_a_file_deleted_while_too_many_are_open_to_keep_it_is_compiled_again(
    model, expected, filled, monkeypatch
):
    folder, chunks = filled
    # None may stay open: with one, it would be for whichever thread comes first.
    monkeypatch.setattr(chunkfile, "_open_files", chunkfile.threading.BoundedSemaphore(0))
    store = ChunkStore(device_bytes=1, path=folder)
    prompt = linked(model, store, chunks)
    assert all(prompt.report.chunk_hits)
    assert torch.equal(prompt.logits, expected)
    read = chunkfile.ChunkFile.layers

    doomed = path_of(folder, chunks[2].key)

    def after_a_neighbour(self, layers):  # called by several threads
        if 2 in layers:
            doomed.unlink(missing_ok=True)
            monkeypatch.setattr(chunkfile.ChunkFile, "layers", read)
        return read(self, layers)

    monkeypatch.setattr(chunkfile.ChunkFile, "layers", after_a_neighbour)
    prompt = linked(model, store, chunks)
    assert torch.equal(prompt.logits, expected)
    assert prompt.report.chunk_hits == (True, True, False)


def test_a_file_that_is_gone_when_it_is_opened_is_a_miss(model, expected, filled, monkeypatch):
    folder, chunks = filled
    original = files.open_regular

    def late(path):
        os.unlink(path)
        return original(path)

    monkeypatch.setattr(files, "open_regular", late)
    prompt = linked(model, ChunkStore(path=folder), chunks)
    assert torch.equal(prompt.logits, expected)
    assert not any(prompt.report.chunk_hits)
    assert prompt.report.store_failures == {}


def test_a_file_cut_short_by_others_while_it_is_read_kills_nobody(tmp_path):
    """With a mapping the process died of SIGBUS in 25 of 40 such runs."""
    kv = chunk(0, tokens=2000, layers=8)
    store = ChunkStore(device_bytes=1, path=tmp_path)
    store.put(KEY, kv)
    path, whole = path_of(tmp_path, KEY), path_of(tmp_path, KEY).read_bytes()
    cutter = textwrap.dedent(f"""
        import os, time
        while True:
            try:
                os.truncate({str(path)!r}, 5000)
            except FileNotFoundError:
                time.sleep(0)
    """)
    process = subprocess.Popen([sys.executable, "-c", cutter])
    refused = right = 0
    try:
        for _ in range(150):
            path.write_bytes(whole)
            found = store.get(KEY)
            if found is None:
                refused += 1
                continue
            try:
                assert same_kv(found, kv)
                right += 1
            except CorruptChunk:
                refused += 1
    finally:
        process.kill()
        process.wait()
    assert refused > 0, "nothing was cut short: the test shows nothing"
    assert refused + right == 150


# What the system refuses


ERRORS = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied"),
    TimeoutError("timed out"),
    ClientError("503 Slow Down"),
    RuntimeError("unable to open file"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["open", "layers", "reserve", "fill", "publish"])
def test_a_link_goes_on_whatever_the_disk_raises(
    model, expected, filled, monkeypatch, where, error
):
    folder, chunks = filled

    def fails(*args, **kwargs):
        raise error

    places = {
        "open": (files, "open_regular"),
        "layers": (chunkfile.ChunkFile, "layers"),
        "reserve": (folder_index.FolderIndex, "reserve"),
        "fill": (files.LocalFiles, "fill"),
        "publish": (files.LocalFiles, "publish"),
    }
    reading = where in ("open", "layers")
    store = ChunkStore(path=folder)
    if not reading:
        store.clear()
    monkeypatch.setattr(*places[where], fails)
    with pytest.warns(RuntimeWarning, match=type(error).__name__) as warned:
        prompt = PIC(model, store=store).link(chunks, QUERY, LegoLink(3))
    assert torch.equal(prompt.logits, expected)
    assert not any(prompt.report.chunk_hits)
    kind = f"disk {'read' if reading else 'write'}: {type(error).__name__}"
    assert prompt.report.store_failures[kind] >= 1
    assert store.stats().failures == prompt.report.store_failures
    assert len([w for w in warned if w.filename == __file__]) == 1, (
        "once, and where link was called"
    )
    assert kind in str(prompt.report)
    assert store.disk_failures == (0 if reading else 3)
    assert store.corrupt == 0
    monkeypatch.undo()
    assert not list(folder.rglob("*.tmp"))
    again = PIC(model, store=ChunkStore(path=folder)).link(chunks, QUERY, LegoLink(3))
    assert torch.equal(again.logits, expected)


def test_what_cannot_be_deleted_for_room_costs_the_write_and_no_link(
    model, expected, filled, monkeypatch
):
    folder, chunks = filled
    room = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    store = ChunkStore(path=folder, disk_bytes=room)

    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    held = sorted(folder.rglob("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        other = PIC(model, store=store)
        with pytest.warns(RuntimeWarning, match="Permission denied"):
            new = other.compile(random_ids(40, seed=7))
        prompt = linked(model, store, [*chunks, new])
        assert prompt.report.chunk_hits == (True,) * 4
        with pytest.raises(PICacheError, match=r"cannot clear .*Permission denied"):
            store.clear()
    assert new.key in store
    assert store.get(new.key).tier == "device"
    assert sorted(folder.rglob("*.safetensors")) == held
    assert store.disk_failures == 1
    store.put("other", chunk())
    assert store.disk_failures == 1
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= room


def test_one_file_that_cannot_be_deleted_does_not_stop_the_others_from_leaving(
    tmp_path, monkeypatch
):
    store = ChunkStore(path=tmp_path)
    keys = [f"{i}" * 8 for i in range(4)]
    for index, key in enumerate(keys):
        store.put(key, chunk(index))
    size = path_of(tmp_path, keys[0]).stat().st_size
    original = os.unlink

    def refused(path, *args, **kwargs):
        if keys[0] in str(path):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        original(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", refused)
    bounded = ChunkStore(path=tmp_path, disk_bytes=4 * size)
    bounded.put("9" * 8, chunk(9))
    assert [key for key in [*keys, "9" * 8] if key in bounded] == [keys[0], *keys[2:], "9" * 8]
    assert bounded.failures == {}


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
def test_folders_and_files_that_may_not_be_touched_are_misses(tmp_path):
    """By a user who is not root: mode 000 on a file, then on its shard; a read-only folder."""
    tmp_path = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    code = f"""
        import os, sys, warnings, stat
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        import torch
        from picache import ChunkStore, PICacheError
        os.getuid() or os.setuid(65534)
        warnings.simplefilter("ignore")
        kv = [(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))]
        folder = Path({str(tmp_path)!r}) / "chunks"
        store = ChunkStore(device_bytes=1, path=folder)
        for key in ("a" * 8, "b" * 8, "c" * 8):
            store.put(key, kv)
        size = next(folder.rglob("*.safetensors")).stat().st_size
        next(folder.rglob("aaaaaaaa*")).chmod(0)
        assert store.get("a" * 8) is None
        assert store.failures == {{"disk read: PermissionError": 1}}, store.failures
        (folder / "exact" / "ns=" / "bb").chmod(0)
        assert store.get("b" * 8) is None
        assert "b" * 8 not in store
        assert len(list(store.get("c" * 8))) == 1
        assert store.corrupt == 0
        store = ChunkStore(path=folder, disk_bytes=3 * size)
        (folder / "exact" / "ns=").chmod(0o555)
        for shard in ("aa", "cc"):
            (folder / "exact" / "ns=" / shard).chmod(0o555)
        store.put("d" * 8, kv)
        assert store.get("d" * 8).tier == "device"
        assert store.disk_failures == 1, store.failures
        try:
            store.clear()
        except PICacheError as error:
            assert "Permission denied" in str(error) or "readonly" in str(error)
        else:
            raise AssertionError("cleared")
        assert store.get("d" * 8).tier == "device" and len(list(store.get("c" * 8))) == 1
    """
    tmp_path.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd="/", capture_output=True, text=True
    )
    subprocess.run(["chmod", "-R", "u+rwX", tmp_path], check=True)
    subprocess.run(["rm", "-rf", tmp_path], check=True)
    assert done.returncode == 0, done.stderr


# What does not belong there


def make_fifo(path):
    os.mkfifo(path)


def make_folder(path):
    path.mkdir()
    (path / "inside").write_text("x")


def make_loop(path):
    path.symlink_to(path)


def make_dangling(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links as on POSIX")
@pytest.mark.parametrize("make", [make_fifo, make_folder, make_loop, make_dangling])
def test_what_is_no_file_under_a_chunks_name_is_a_miss(model, expected, filled, make):
    folder, chunks = filled
    path = path_of(folder, chunks[1].key)
    path.unlink()
    make(path)
    store = ChunkStore(path=folder, disk_bytes=10**6)
    prompt = linked(model, store, chunks)
    assert torch.equal(prompt.logits, expected)
    assert prompt.report.chunk_hits == (True, False, True)
    assert len(store) == 3
    store.put("other", chunk())
    assert len(store) == 4


def test_foreign_names_in_the_folder_are_left_alone(filled):
    folder, chunks = filled
    shard = path_of(folder, chunks[0].key).parent
    strangers = [shard / "thesis.tex", shard / "..safetensors", shard / "a b.safetensors"]
    strangers += [shard / f"{OTHER}x.safetensors", shard.parent / "README", shard.parent / "zz"]
    for path in strangers:
        path.write_text("x")
    (folder / "index.json").write_text("{")
    store = ChunkStore(path=folder, disk_bytes=2000)
    assert not list(folder.rglob(f"{chunks[0].key}*"))
    assert all(path.exists() for path in strangers)
    store.clear()
    assert all(path.exists() for path in strangers)


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"__metadata__":' * 20_000 + b"1" + b"}" * 20_000,
        b"{" + b'"a":1,' * 5 + b'"b":' + b"9" * 6000 + b"}",
        b"\xff\xfe{}",
        b"[]",
        b"7",
        b"null",
        b'{"__metadata__": []}',
        b'{"__metadata__": {"format": 7}}',
        b'{"__metadata__": {"format": "picache-chunk/2", "checksum": {"a": []}}}',
        b'{"0.keys": 7}',
        b'{"0.keys": {"dtype": [], "shape": "x", "data_offsets": {}}}',
        b"",
    ],
)
def test_a_header_that_is_no_header_is_damage(filled, text):
    folder, chunks = filled
    path = path_of(folder, chunks[0].key)
    write_raw(path, text)
    store = ChunkStore(path=folder)
    assert store.get(chunks[0].key) is None
    assert store.corrupt == 1
    assert store.failures == {}


@pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 2**40, 10**8])
def test_a_header_longer_than_its_file_takes_no_memory(filled, length):
    folder, chunks = filled
    path = path_of(folder, chunks[0].key)
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    store = ChunkStore(path=folder)
    assert store.get(chunks[0].key) is None
    assert store.corrupt == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": "5"},
        {"tokens": True},
        {"tokens": -5},
        {"dtype": []},
        {"dtype": {"a": 1}},
        {"namespace": None},
        {"storage": ["exact"]},
        {"compile_seconds": "fast"},
        {"compile_seconds": float("nan")},
        {"compile_seconds": float("inf")},
        {"compile_seconds": -1},
        {"model": 7},
    ],
)
def test_wrong_types_in_a_sealed_header_are_damage(filled, fields):
    folder, chunks = filled
    rewrite(path_of(folder, chunks[0].key), set_header(**fields))
    store = ChunkStore(path=folder)
    assert store.get(chunks[0].key) is None
    assert store.corrupt == 1
    assert store.failures == {}


@pytest.mark.parametrize("checksums", ["{}", "[1, 2, 3, 4]", "[[], [], [], []]", "[" * 50_000])
def test_checksums_of_another_kind_are_damage(filled, checksums):
    folder, chunks = filled
    rewrite(path_of(folder, chunks[0].key), lambda m, t: m.update(checksums=checksums))
    store = ChunkStore(path=folder)
    found = store.get(chunks[0].key)
    if found is not None:
        with pytest.raises(CorruptChunk):
            found.load()
    assert store.corrupt == 1


# A file system behind a URL


class Broken:
    """Makes every call of the file system fail, of all files under one URL."""

    def __init__(self, patch, error):
        import fsspec

        memory = type(fsspec.filesystem("memory"))

        def fails(*args, **kwargs):
            raise error

        for call in ("cat_file", "info", "exists", "find", "ls", "pipe_file", "mv", "rm_file"):
            patch.setattr(memory, call, fails)


@pytest.fixture
def url():
    pytest.importorskip("fsspec")
    return f"memory://picache-{uuid.uuid4().hex}/chunks"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_link_goes_on_with_a_dead_remote_tier(model, expected, url, monkeypatch, error):
    fast = dict(remote_timeout=5.0, remote_retries=0, remote_pause=0.0)
    store = ChunkStore(path=url, disk_bytes=10**6, **fast)
    pic = PIC(model, store=store)
    chunks = [pic.compile(text) for text in TEXTS]
    fresh = ChunkStore(path=url, disk_bytes=10**6, **fast)
    with monkeypatch.context() as patch:
        Broken(patch, error)
        prompt = linked(model, fresh, chunks)
        assert torch.equal(prompt.logits, expected)
        assert not any(prompt.report.chunk_hits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert fresh.get(KEY) is None
            assert KEY not in fresh
            assert len(fresh) == 3
            fresh.put(KEY, chunk())
            assert same_kv(fresh.get(KEY), chunk())
            assert "disk write" in str(fresh.stats().failures)
        with pytest.raises(PICacheError, match="cannot pin"):
            fresh.pin(OTHER)
        with pytest.raises(PICacheError, match="cannot clear"):
            fresh.clear()
        assert KEY in fresh
        with pytest.raises(PICacheError, match="cannot keep chunks in"):
            ChunkStore(path=url, **fast)
    again = linked(model, ChunkStore(path=url, **fast), chunks)
    assert torch.equal(again.logits, expected)
    assert all(again.report.chunk_hits)
    assert fresh.corrupt == 0


def test_a_failed_move_to_host_memory_loses_a_chunk_and_no_put(monkeypatch):
    from picache.store import memory

    def no_memory(part):
        raise RuntimeError("cudaHostAlloc: out of memory")

    kv = [(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))]
    store = ChunkStore(device_bytes=128, host_bytes=10**6)
    store.put("a", kv)
    monkeypatch.setattr(memory, "to_host", no_memory)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        store.put("b", kv)
    assert ("a" in store, "b" in store, store.evictions) == (False, True, 1)
    assert store.failures == {"host write: RuntimeError": 1}
    assert store.nbytes == 128


def test_compiling_into_a_store_with_no_room_but_a_disk_that_fails_is_no_error(
    model, tmp_path, monkeypatch
):
    store = ChunkStore(device_bytes=1, path=tmp_path)
    pic = PIC(model, store=store)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.LocalFiles, "fill", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        chunks = [pic.compile(text) for text in TEXTS]
    assert linked(model, store, chunks).report.misses == 3
    with pytest.raises(StoreUnavailable, match=r"does not fit .* disk failed: .*No space left"):
        store.put(KEY, chunk())
    with pytest.raises(PICacheError, match="does not fit a store of 1 bytes"):
        PIC(model, store=ChunkStore(device_bytes=1)).compile(TEXTS[0])


def test_the_cause_is_counted_though_what_was_written_cannot_be_deleted_either(
    tmp_path, monkeypatch
):
    kept = ChunkStore(path=tmp_path)
    kept.put(KEY, chunk())
    size = path_of(tmp_path, KEY).stat().st_size
    store = ChunkStore(path=tmp_path, disk_bytes=3 * size)
    original = files.LocalFiles.fill

    def full(self, temporary, data):
        original(self, temporary, data)
        raise OSError(errno.EIO, "Input/output error")

    def refused(*args, **kwargs):
        raise TimeoutError("locked")

    with monkeypatch.context() as patch:
        patch.setattr(files.LocalFiles, "fill", full)
        patch.setattr(folder_index.FolderIndex, "release", refused)
        with pytest.warns(RuntimeWarning, match="Input/output error"):
            store.put(OTHER, chunk(1))
    assert store.failures == {"disk write: OSError": 1}
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    for index in range(3):  # whoever needs the room has it
        store.put(OTHER[:-1] + str(index), chunk(index))
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_interrupts_are_not_failures(filled, monkeypatch):
    folder, chunks = filled

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(chunkfile.ChunkFile, "layers", interrupted)
    found = ChunkStore(path=folder).get(chunks[0].key)
    with pytest.raises(KeyboardInterrupt):
        found.load()
    assert signal.getsignal(signal.SIGINT)
