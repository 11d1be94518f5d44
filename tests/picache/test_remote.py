"""A store behind a URL: servers that stall, fail, cut short, or can only be read."""

import http.server
import os
import socket
import threading
import time
import uuid
import warnings

import pytest
import torch

from picache import PIC, ChunkStore, LegoLink, PICacheError
from picache.errors import CorruptChunk
from picache.store import listed_index, remote_calls, writers
from picache.store.remote_calls import RemoteCalls, RemoteLimits, TierResting
from tests.helpers import random_ids, tiny_model
from tests.picache.disk_chunks import KEY, OTHER, chunk
from tests.picache.helpers import same_kv

fsspec = pytest.importorskip("fsspec")
FAST = dict(remote_timeout=0.3, remote_retries=1, remote_pause=60.0)


@pytest.fixture
def url():
    return f"memory://picache-{uuid.uuid4().hex}/chunks"


@pytest.fixture
def memory(monkeypatch):
    """The class of the file system, to patch."""
    return type(fsspec.filesystem("memory"))


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def objects(url, ending=".safetensors"):
    found = fsspec.filesystem("memory").find(url.removeprefix("memory:/"))
    return [path for path in found if path.endswith(ending)]


# Limits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remote_timeout": 0}, "remote_timeout must be a positive number of seconds, got 0"),
        ({"remote_timeout": float("inf")}, "remote_timeout must be .* got inf"),
        ({"remote_timeout": float("nan")}, "remote_timeout must be .* got nan"),
        ({"remote_retries": -1}, "remote_retries must be a whole number of 0 to 10, got -1"),
        ({"remote_retries": 11}, "remote_retries must be .* got 11"),
        ({"remote_retries": 1.5}, "remote_retries must be .* got 1.5"),
        ({"remote_retries": True}, "remote_retries must be .* got True"),
        ({"remote_pause": -1}, "remote_pause must be .* got -1"),
    ],
)
def test_bad_limits_are_refused(arguments, message):
    with pytest.raises(PICacheError, match=message):
        ChunkStore(**arguments)


def test_a_call_is_made_again_a_bounded_number_of_times():
    made = []

    def fails():
        made.append(1)
        raise OSError("503")

    for retries in (0, 1, 3):
        made.clear()
        with pytest.raises(OSError, match="503"):
            RemoteCalls(RemoteLimits(1.0, retries, 0.0))(fails)
        assert len(made) == retries + 1


def test_a_call_that_works_the_second_time_is_no_failure():
    answers = [OSError("503"), TimeoutError(), "well"]

    def flaky():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert RemoteCalls(RemoteLimits(1.0, 2, 60.0))(flaky) == "well"


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, NotImplementedError])
def test_an_answer_that_will_not_change_is_not_asked_for_again(error):
    made = []

    def fails():
        made.append(1)
        raise error("no")

    calls = RemoteCalls(RemoteLimits(1.0, 3, 60.0))
    for count in range(1, 6):
        with pytest.raises(error):
            calls(fails)
        assert len(made) == count


def test_a_call_ends_in_time_and_more_is_given_to_what_moves_more():
    calls = RemoteCalls(RemoteLimits(0.2, 0, 0.0))
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 seconds"):
        calls(time.sleep, 5)
    assert time.monotonic() - begun < 2
    calls(time.sleep, 0.6, nbytes=2 * 2**20)


def test_a_dead_tier_is_left_alone_for_a_while_and_then_asked_once(monkeypatch):
    now, made, dead = [100.0], [], [True]
    monkeypatch.setattr(remote_calls.time, "monotonic", lambda: now[0])

    def fails():
        made.append(1)
        if dead[0]:
            raise OSError("dead")
        return "back"

    calls = RemoteCalls(RemoteLimits(1.0, 0, 30.0))
    for _ in range(2):
        with pytest.raises(OSError, match="dead"):
            calls(fails)
    for _ in range(50):
        with pytest.raises(TierResting, match=r"fails failed 2 times in a row, .* 30 seconds"):
            calls(fails)
    assert len(made) == 2
    now[0] += 31
    with pytest.raises(OSError, match="dead"):
        calls(fails)
    with pytest.raises(TierResting):
        calls(fails)
    assert len(made) == 3
    now[0] += 31
    dead[0] = False
    assert calls(fails) == "back"
    dead[0] = True
    with pytest.raises(OSError, match="dead"):
        calls(fails)
    with pytest.raises(OSError, match="dead"):  # one failure is none yet
        calls(fails)


# Servers that stall


def test_a_link_beside_a_stalled_tier_takes_its_timeouts_and_no_more(url, memory, monkeypatch):
    model = tiny_model("llama")
    texts = [random_ids(n, seed=n) for n in (9, 30, 21, 14, 11, 8)]
    first = PIC(model, store=ChunkStore(path=url))
    chunks = [first.compile(text) for text in texts]
    expected = first.link(chunks, random_ids(4), LegoLink(3)).logits
    store, stalled = ChunkStore(path=url, **FAST), threading.Event()
    pic = PIC(model, store=store)

    def stalls(*args, **kwargs):
        stalled.wait(60)

    monkeypatch.setattr(memory, "info", stalls)
    begun = time.monotonic()
    with pytest.warns(RuntimeWarning) as warned:
        prompt = pic.link(chunks, random_ids(4), LegoLink(3))
    took = time.monotonic() - begun
    stalled.set()
    assert torch.equal(prompt.logits, expected)
    assert not any(prompt.report.chunk_hits)
    seen = prompt.report.store_failures
    assert seen["disk read: TimeoutError"] == 2, "and then it was left alone"
    assert seen["disk read: TierResting"] == 4
    assert seen["disk write: TierResting"] == 5, "the first was written: only reading stalls"
    assert any("is not asked for 60 seconds" in str(w.message) for w in warned)
    assert took < 2 * 2 * 0.3 + 2 * 0.1 + 5


class Stalled:
    """A server that takes connections and never answers."""

    def __enter__(self):
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(50)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/chunks"

    def __exit__(self, *error):
        self._socket.close()


def test_opening_a_stalled_server_is_refused_in_time():
    pytest.importorskip("aiohttp")
    with Stalled() as address:
        begun = time.monotonic()
        with pytest.raises(PICacheError, match=r"cannot keep chunks in http://.*TimeoutError"):
            ChunkStore(path=address, **FAST)
        assert time.monotonic() - begun < 5


class Server:
    """A web server of one folder, which can be told to misbehave: a name of `MOODS`."""

    MOODS = ("well", "stalls", "cuts", "fails", "slams", "flips")

    def __init__(self, folder):
        self.mood = "well"
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, directory=str(folder), **kwargs)

            def log_message(self, *args):
                pass

            def do_GET(self):
                if outer.mood == "stalls":
                    time.sleep(2)
                elif outer.mood == "fails":
                    self.send_error(503)
                elif outer.mood == "slams":
                    self.connection.close()
                elif outer.mood in ("cuts", "flips"):
                    self.spoilt()
                else:
                    super().do_GET()

            def spoilt(self):
                path = self.translate_path(self.path)
                if not os.path.isfile(path):
                    self.send_error(404)
                    return
                with open(path, "rb") as file:
                    data = bytearray(file.read())
                data[-1] ^= 1
                data = data[: len(data) // 2] if outer.mood == "cuts" else data
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def served(tmp_path):
    pytest.importorskip("aiohttp")
    ChunkStore(path=tmp_path / "chunks").put(KEY, chunk())
    with Server(tmp_path) as server:
        yield server


def test_a_served_folder_can_be_read_and_is_not_written(served):
    store = ChunkStore(path=f"{served.url}/chunks", **FAST)
    assert KEY in store
    assert same_kv(store.get(KEY), chunk())
    assert OTHER not in store
    assert store.get(OTHER) is None
    store.put(OTHER, chunk(1))
    assert store.get(OTHER).tier == "device"
    store.pin(KEY)
    assert len(store) == 1
    assert store.failures == {}
    with pytest.raises(PICacheError, match="read only"):
        store.clear()
    assert OTHER in store
    again = ChunkStore(path=f"{served.url}/chunks")
    assert again.get(OTHER) is None
    assert same_kv(again.get(KEY), chunk())


def test_a_served_folder_that_is_no_store_is_refused_by_name(served, tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(PICacheError, match=r"thesis is read only and has no picache-store.json"):
        ChunkStore(path=f"{served.url}/thesis", **FAST)
    with pytest.raises(PICacheError, match=r"disk_bytes=5 cannot be kept .* read only"):
        ChunkStore(path=f"{served.url}/chunks", disk_bytes=5)
    served.mood = "fails"
    with pytest.raises(PICacheError, match="cannot keep chunks in"):
        ChunkStore(path=f"{served.url}/chunks", **FAST)


@pytest.mark.parametrize("mood", [mood for mood in Server.MOODS if mood != "well"])
def test_a_server_in_any_mood_gives_the_chunk_or_nothing(served, tmp_path, quiet, mood):
    store = ChunkStore(device_bytes=1, path=f"{served.url}/chunks", **FAST | dict(remote_pause=0.0))
    served.mood = mood
    found = store.get(KEY)
    if found is not None:
        with pytest.raises(CorruptChunk):
            found.load()
    assert store.get(OTHER) is None
    served.mood = "well"
    assert same_kv(store.get(KEY), chunk())
    assert list((tmp_path / "chunks").rglob("*.safetensors")), "nothing was deleted"


# Reads that are damaged on the way


def spoil(data, how):
    if how == "cut":
        return data[: len(data) // 2]
    if how == "cut header":
        return data[:50]
    if how == "empty":
        return b""
    data = bytearray(data)
    data[-1 if how == "flipped layer" else 60] ^= 1
    return bytes(data)


HOWS = ["cut", "cut header", "empty", "flipped layer", "flipped header"]


@pytest.mark.parametrize("how", HOWS)
def test_one_damaged_download_deletes_no_good_object(url, memory, monkeypatch, how):
    ChunkStore(path=url).put(KEY, chunk())
    original, spoilt = memory.cat_file, []

    def once(self, path, *args, **kwargs):
        data = original(self, path, *args, **kwargs)
        if KEY in path and not spoilt:
            spoilt.append(path)
            return spoil(data, how)
        return data

    store = ChunkStore(device_bytes=1, path=url)
    monkeypatch.setattr(memory, "cat_file", once)
    assert same_kv(store.get(KEY), chunk())
    assert len(spoilt) == 1
    assert store.corrupt == 0
    assert len(objects(url)) == 1


@pytest.mark.parametrize("how", HOWS)
def test_what_is_damaged_on_a_second_read_too_is_dropped(url, how):
    ChunkStore(path=url).put(KEY, chunk())
    filesystem = fsspec.filesystem("memory")
    (path,) = objects(url)
    filesystem.pipe_file(path, spoil(filesystem.cat_file(path), how))
    store = ChunkStore(path=url)
    found = store.get(KEY)
    if found is not None:
        with pytest.raises(CorruptChunk):
            found.load()
    assert store.corrupt == 1
    assert objects(url) == []
    assert store.get(KEY) is None
    store.put(KEY, chunk())
    assert same_kv(ChunkStore(path=url).get(KEY), chunk())


# Bounds behind a URL


def sizes(url):
    filesystem = fsspec.filesystem("memory")
    return sum(filesystem.size(path) for path in objects(url, ("tensors", ".tmp")))


def test_a_bound_holds_behind_a_url(url):
    ChunkStore(path=url, namespace="probe").put("k0", chunk())
    one = sizes(url)
    url += "2"
    store = ChunkStore(device_bytes=1, path=url, disk_bytes=3 * one + 50)
    for seed in range(8):
        store.put(f"k{seed}", chunk(seed))
        assert sizes(url) <= 3 * one + 50
        if seed > 1:
            store.get("k0")
    assert len(store) == 3
    assert store.evictions == 5
    assert len(objects(url)) == 3


def test_another_processs_objects_count_from_the_next_listing_on(url, monkeypatch):
    store = ChunkStore(device_bytes=1, path=url, disk_bytes=10**6)
    store.put("k0", chunk())
    one = sizes(url)
    store = ChunkStore(device_bytes=1, path=url, disk_bytes=3 * one + 50)
    store.put("k1", chunk())
    for seed in range(2, 6):
        ChunkStore(path=url).put(f"k{seed}", chunk(seed))
    monkeypatch.setattr(listed_index, "REFRESH_SECONDS", 0.0)
    store.put("k6", chunk(6))
    assert sizes(url) <= 3 * one + 50


def test_what_a_killed_writer_left_behind_a_url_counts_and_goes(url):
    store = ChunkStore(device_bytes=1, path=url, disk_bytes=10**6)
    store.put("k0", chunk())
    one = sizes(url)
    child = os.fork()
    if child == 0:
        os._exit(0)
    name = writers.temporary_name("ab/abcd.safetensors", 2 * one)
    dead = name.replace(f"-{os.getpid()}-", f"-{child}-")
    os.waitpid(child, 0)
    root = url.removeprefix("memory:/") + "/exact/ns="
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file(f"{root}/{dead}", b"x" * one)
    stranger = f"{root}/ab/.y.{one}.deadbeef-1-1.{'0' * 32}.tmp"
    filesystem.pipe_file(stranger, b"x" * one)
    store = ChunkStore(device_bytes=1, path=url, disk_bytes=4 * one + 50)
    assert store.stats().tiers[-1].nbytes == 4 * one, "reserved bytes count"
    for seed in range(1, 5):
        store.put(f"k{seed}", chunk(seed))
    assert objects(url, ".tmp") == [stranger], "another machine's may be written just now"
    assert store.stats().tiers[-1].nbytes == 4 * one
    store.clear()
    assert objects(url) == []


def test_a_failed_upload_leaves_nothing_and_gives_its_room_back(url, memory, monkeypatch, quiet):
    store = ChunkStore(device_bytes=1, path=url, disk_bytes=10**5, **FAST | dict(remote_pause=0.0))
    store.put("k0", chunk())

    def fails(*args, **kwargs):
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "mv", fails)
        for turn in range(60):
            with pytest.raises(PICacheError):
                store.put(f"x{turn}", chunk())
    assert objects(url, ".tmp") == []
    assert store.disk_failures == 60
    store.put("k1", chunk())
    assert len(objects(url)) == 2
