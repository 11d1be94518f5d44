"""Errors and damage: of system calls, of a network, and in files somebody made."""

import errno
import json
import os
import random
import sqlite3
import tempfile
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from picache import PIC, ChunkStore, LegoLink, PICacheError
from picache.store import chunkfile, files
from tests.helpers import random_ids, tiny_model
from tests.picache.attacks.tally import KEYS, Tally

ERRNOS = [errno.EIO, errno.EACCES, errno.ENOSPC, errno.EMFILE, errno.ESTALE, errno.EROFS]
CALLS = ["open", "replace", "unlink", "fsync", "scandir", "stat", "lstat", "utime", "mkdir"]


class Linker:
    """Links of one prompt, whose logits are known."""

    def __init__(self):
        self.model = tiny_model("llama")
        self.texts = [random_ids(n, seed=n) for n in (9, 30, 21)]
        self.query = random_ids(4, seed=4)
        pic = PIC(self.model)
        chunks = [pic.compile(text) for text in self.texts]
        self.expected = pic.link(chunks, self.query, LegoLink(3)).logits

    def link(self, tally, store):
        def work():
            pic = PIC(self.model, store=store)
            chunks = [pic.compile(text) for text in self.texts]
            return pic.link(chunks, self.query, LegoLink(3)).logits

        logits = tally.run(work, refusals=())
        if logits is not None:
            right = torch.equal(logits, self.expected)
            tally.hits += right
            tally.wrong += not right


@contextmanager
def failing_calls(chance, share):
    """A share of all system calls that Python makes by name fails, and of SQLite's work."""
    patches = []

    def spoilt(call):
        def work(*args, **kwargs):
            if chance.random() < share:
                code = chance.choice(ERRNOS)
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return work

    connect = sqlite3.connect

    def spoilt_connect(*args, **kwargs):
        if chance.random() < share:
            raise sqlite3.OperationalError("disk I/O error")
        return connect(*args, **kwargs)

    patches += [mock.patch.object(os, name, spoilt(getattr(os, name))) for name in CALLS]
    patches.append(mock.patch.object(files, "_write", spoilt(files._write)))
    patches.append(
        mock.patch.object(chunkfile.ChunkFile, "_fill", spoilt(chunkfile.ChunkFile._fill))
    )
    patches.append(mock.patch.object(sqlite3, "connect", spoilt_connect))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def system_calls(scale, seed):
    """Every system call of the package may fail, at any time, for any reason."""
    chance, tally, linker = random.Random(seed), Tally(), Linker()
    for turn in range(max(8, int(60 * scale))):
        with tempfile.TemporaryDirectory() as base:
            bound = None if turn % 2 else 60_000
            store = ChunkStore(device_bytes=1 if turn % 3 else None, path=base, disk_bytes=bound)
            share = chance.choice([0.01, 0.1, 0.5])
            with failing_calls(chance, share):
                for _ in range(40):
                    tally.anything(store, chance.choice(KEYS), chance)
                linker.link(tally, store)
                tally.run(ChunkStore, None, None, base, refusals=(PICacheError,))
                tally.run(store.clear, refusals=(PICacheError,))
            for key in KEYS:  # when it is over, all goes on as before
                tally.get(store, key)
            tally.put(ChunkStore(path=base), KEYS[0])
            tally.expect(KEYS[0] in store, "nothing can be put afterwards")
    return tally


def network(scale, seed):
    """A file system behind a URL that fails, stalls, cuts short and flips bits."""
    import fsspec

    memory = type(fsspec.filesystem("memory"))
    chance, tally, linker = random.Random(seed), Tally(), Linker()
    originals = {
        name: getattr(memory, name)
        for name in ("cat_file", "info", "exists", "find", "pipe_file", "mv", "rm_file")
    }
    share = [0.0]

    def spoilt(name):
        def work(self, *args, **kwargs):
            if chance.random() >= share[0]:
                return originals[name](self, *args, **kwargs)
            mood = chance.choice(["error", "error", "stall", "cut", "flip"])
            if mood == "stall":
                time.sleep(0.08)
            if mood == "error" or name != "cat_file":
                raise chance.choice([OSError("reset"), RuntimeError("503"), ConnectionError()])
            data = bytearray(originals[name](self, *args, **kwargs))
            if mood == "flip" and data:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            return bytes(data[: chance.randrange(len(data) + 1)] if mood == "cut" else data)

        return work

    patches = [mock.patch.object(memory, name, spoilt(name)) for name in originals]
    limits = dict(remote_timeout=0.05, remote_retries=1, remote_pause=0.02)
    for patch in patches:
        patch.start()
    try:
        for turn in range(max(4, int(35 * scale))):
            share[0] = 0.0
            url = f"memory://attacked-{uuid.uuid4().hex}/chunks"
            patient = limits | dict(remote_timeout=5.0)
            good = ChunkStore(path=url, **patient)
            for key in KEYS[:12]:
                tally.put(good, key)
            bound = None if turn % 2 else 400_000
            store = ChunkStore(device_bytes=1, path=url, disk_bytes=bound, **limits)
            share[0] = chance.choice([0.05, 0.3, 0.9])
            for _ in range(40):
                tally.anything(store, chance.choice(KEYS), chance)
            linker.link(tally, store)
            tally.run(ChunkStore, None, None, url, refusals=(PICacheError,))
            share[0] = 0.0
            time.sleep(0.1)
            again = ChunkStore(device_bytes=1, path=url, **patient)
            for key in KEYS:
                tally.get(again, key)
            tally.expect(again.corrupt == 0, "a damaged object was left or made")
    finally:
        for patch in patches:
            patch.stop()
    return tally


def craft(path, good, chance):
    """Put something else in place of a good file."""
    kind = chance.choice(
        ["bytes", "flips", "cut", "longer", "json", "deep", "length", "fifo", "folder", "loop"]
    )
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(crafted(kind, bytearray(good), chance))


def crafted(kind, data, chance):
    if kind == "bytes":
        return chance.randbytes(chance.randrange(5000))
    if kind == "flips":
        for _ in range(chance.randint(1, 5)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return data
    if kind == "cut":
        return data[: chance.randrange(len(data))]
    if kind == "longer":
        return data + chance.randbytes(chance.randint(1, 100))
    size = int.from_bytes(data[:8], "little")
    if kind == "length":
        return chance.getrandbits(64).to_bytes(8, "little") + data[8:]
    if kind == "deep":
        text = b"[" * 200_000
    else:
        entries = json.loads(data[8 : 8 + size])
        name = chance.choice(list(entries))
        strange = [7, None, [], "x", {}, -1, 2**80, [[]], {"dtype": "F32"}, True]
        if name == "__metadata__" or chance.random() < 0.3:
            entries[name] = chance.choice(strange)
        else:
            field = chance.choice(list(entries[name]))
            entries[name][field] = chance.choice([*strange, [0, 2**70], ["a", "b"], [1, 1, 1, 1]])
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def crafted_files(scale, seed):
    """Files under a chunk's name that somebody made or damaged."""
    chance, tally = random.Random(seed), Tally()
    key = KEYS[3]
    with tempfile.TemporaryDirectory() as base:
        for _ in range(max(100, int(1500 * scale))):
            folder = Path(base) / uuid.uuid4().hex
            store = ChunkStore(device_bytes=1, path=folder)
            tally.put(store, key)
            path = folder / "exact" / "ns=" / key[:2] / f"{key}.safetensors"
            craft(path, path.read_bytes(), chance)
            tally.get(store, key)
            tally.run(lambda where: ChunkStore(path=where, disk_bytes=50_000), folder)
            tally.put(store, key)
            tally.get(store, key)
    return tally


def vandals(scale, seed):
    """Links while a neighbour deletes, cuts, damages and evicts their files."""
    tally, linker = Tally(), Linker()
    with tempfile.TemporaryDirectory() as base:
        until = threading.Event()

        def vandal():
            own = random.Random(seed + 1)
            while not until.is_set():
                for path in list(Path(base).rglob("*.safetensors")):
                    mood = own.choice(["unlink", "cut", "flip", "leave", "leave"])
                    try:
                        if mood == "unlink":
                            path.unlink()
                        elif mood == "cut":
                            os.truncate(path, own.randrange(path.stat().st_size + 1))
                        elif mood == "flip":
                            with path.open("r+b") as file:
                                file.seek(own.randrange(path.stat().st_size + 1))
                                file.write(b"\xff")
                    except FileNotFoundError:
                        continue
                time.sleep(own.uniform(0, 0.02))

        thread = threading.Thread(target=vandal)
        thread.start()
        try:
            for turn in range(max(15, int(150 * scale))):
                bound = None if turn % 2 else 60_000
                store = tally.run(lambda bound: ChunkStore(1, None, base, disk_bytes=bound), bound)
                linker.link(tally, store)
        finally:
            until.set()
            thread.join()
    return tally
