"""Two processes that share a model's heads (gloo, CPU) link and decode as one process does."""

import json
import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers

from picache import (
    A3,
    APE,
    PIC,
    CacheBlend,
    ChunkStore,
    FullRecompute,
    LegoLink,
    NaiveReuse,
    OracleDeviation,
    PICacheError,
    ProphetKV,
    RandomRecompute,
)
from picache.errors import StoreFull
from picache.hf import self_check
from picache.hf.tensor_parallel import Shards
from sparsity import RaaS, SparseCache, SparsityError, StreamingLLM, record
from tests.helpers import free_port, random_ids, tiny_model

PROCESSES = 2
SECONDS = 60
"""That one process waits for another at most."""
SHAPE = dict(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
METHODS = [
    LegoLink(4),
    NaiveReuse(),
    FullRecompute(),
    CacheBlend(0.3),  # of these three every process must choose the same tokens
    ProphetKV(0.3),
    ProphetKV(0.2, value_norm=True),
    A3(0.3),
    OracleDeviation(0.3),
    APE(),
    RandomRecompute(k=3),
]
POLICIES = [RaaS(24, page_size=4, pin_prompt=False), StreamingLLM(16)]


def linked(model, folder):
    """What is generated behind links, and their first logits, by method; and the chunks' keys."""
    store = ChunkStore(path=folder / "store")
    pic = PIC(model, store=store, flops_per_byte=None)
    found = {}
    texts = [random_ids(11, seed=seed) for seed in range(4)]
    for method in METHODS:
        chunks = [pic.compile(texts[0]), *pic.compile_all(texts[1:])]
        prompt = pic.link(chunks, random_ids(5, seed=9), method=method)
        with prompt.attached() if method.parallel else nullcontext():
            out = model.generate(**prompt, max_new_tokens=6, do_sample=False)
        found[repr(method)] = out[0].tolist(), prompt.logits[0].tolist(), recomputed(prompt)
    rows = [chunks[:2], chunks[2:]], [random_ids(5, seed=9), random_ids(3, seed=8)]
    prompt = pic.link(*rows, method=LegoLink(2))
    out = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    found["batch"] = out.tolist(), prompt.logits.tolist(), recomputed(prompt)
    for policy in POLICIES:
        prompt = pic.link(chunks, random_ids(5, seed=9), method=LegoLink(2))
        ids, kv = prompt["input_ids"], prompt["past_key_values"]
        cache = SparseCache(model, policy, past=kv)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
        found[f"behind a link, {policy!r}"] = out.tolist(), [], []
    kept = {chunk.key: store.get(chunk.key) is not None for chunk in chunks}
    return found, kept


def recomputed(prompt):
    return [report.tokens_recomputed for report in prompt.reports]


def one_store_forgets(model, rank):
    """A chunk that one process has and the other has lost is compiled by both."""
    pic = PIC(model, flops_per_byte=None)
    chunks = [pic.compile(random_ids(11, seed=seed)) for seed in range(3)]
    if rank == 0:
        pic.store.clear()
    prompt = pic.link(chunks, random_ids(5, seed=9), method=LegoLink(2))
    again = PIC(model, flops_per_byte=None)
    fresh = [again.compile(random_ids(11, seed=seed)) for seed in range(3)]
    if rank == 1:
        again.store.clear()
    passes = []
    model_prefill = again.hf.prefill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            again.hf, "prefill", lambda ids: passes.append(len(ids)) or model_prefill(ids)
        )
        again.compile_all([random_ids(11, seed=seed) for seed in range(3)])
    same = [one.key for one in chunks] == [one.key for one in fresh]
    return prompt.logits[0].tolist(), prompt.report.chunk_hits, same, sum(passes)


def one_process_finds_damage(model, rank, folder):
    """First logits of links, and hits of chunks, with a chunk damaged on the first process's disk.

    Each chunk is on disk only, and what is damaged is its last layer: it is found when the first
    would have been recomputed.
    """

    def pic():
        return PIC(model, store=ChunkStore(path=own), flops_per_byte=None)

    def linked():
        prompt = pic().link(chunks, random_ids(5, seed=9), method=LegoLink(2))
        return prompt.logits[0].tolist(), prompt.report.chunk_hits

    def damage():
        if rank == 0:
            (file,) = own.rglob(f"*{chunks[1].key}*.safetensors")
            data = bytearray(file.read_bytes())
            data[-8] ^= 1
            file.write_bytes(data)

    own = folder / f"damaged-{rank}"
    chunks = [pic().compile(random_ids(11, seed=seed)) for seed in range(3)]
    whole = linked()
    damage()
    mended = linked()
    damage()
    pic().compile(random_ids(11, seed=1))
    return whole, mended, linked()


def one_store_is_full(model, rank):
    """What compiling says where the second process has no room."""
    said = []
    for together in (False, True):
        store = ChunkStore(device_bytes=64 if rank else None)
        pic = PIC(model, store=store, flops_per_byte=None)
        try:
            if together:
                pic.compile_all([random_ids(11, seed=seed) for seed in range(3)])
            else:
                pic.compile(random_ids(11))
        except StoreFull as error:
            said.append(str(error))
    chunks = [PIC(model).compile(random_ids(11, seed=seed)) for seed in range(2)]
    pic = PIC(model, store=store, flops_per_byte=None)
    return said, pic.link(chunks, random_ids(5, seed=9)).logits[0].tolist()  # which needs no room


def one_check_fails(model, rank):
    """What the self-check says where only the second process finds an error."""
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setitem(self_check._TOLERANCE, torch.float32, (-1.0, 1.0))
        try:
            PIC(model).compile(random_ids(11))
        except PICacheError as error:
            return str(error)
    return ""


def other_weights_elsewhere(model, rank):
    """Keys of a chunk before and after weights changed, of the second process alone."""
    keys = []
    for _ in range(2):
        keys.append(PIC(model).compile(random_ids(11)).key)
        if rank == 1:
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight.to_local().mul_(1.5)
    return keys


def refused(model):
    try:
        record(model, input_ids=random_ids(9, 1), max_new_tokens=2)
    except SparsityError as error:
        return str(error)
    return ""


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # Where one process waits in vain for the other, that is an error.
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    config = {"distributed_config": transformers.DistributedConfig(tp_plan="auto")}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **config).eval()
    found, kept = linked(model, Path(folder))
    total = Shards.of(model).summed(torch.tensor([1.0 + rank, (0.1, 0.7)[rank]]))
    results = {
        "linked": found,
        "kept": kept,
        "summed": total.tolist(),
        "heads": PIC(model).hf.one_token[0][0].shape[1],
        "groups": PIC(model).hf.groups,
        "forgotten": one_store_forgets(model, rank),
        "damaged": one_process_finds_damage(model, rank, Path(folder)),
        "full": one_store_is_full(model, rank),
        "check": one_check_fails(model, rank),
        "refused": refused(model),
        "keys": other_weights_elsewhere(model, rank),  # changes the model, so it comes last
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process links, and what each of two does; they keep chunks in one folder."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama", **SHAPE)
    model.save_pretrained(folder)
    alone = linked(model, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        running = mp.start_processes(
            work,
            (free_port(), str(folder)),
            nprocs=PROCESSES,
            start_method="spawn",
            join=False,
        )
        end = time.monotonic() + 10 * SECONDS
        try:
            while not running.join(timeout=SECONDS):
                assert time.monotonic() < end, "the processes hang"
        finally:
            for process in running.processes:
                process.kill()
    shares = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return alone, shares


def test_links_are_those_of_one_process(both):
    (expected, _), shares = both
    assert list(shares[0]["linked"]) == list(expected)
    for share in shares:
        for name, (tokens, logits, recomputed) in share["linked"].items():
            assert tokens == expected[name][0], name
            assert recomputed == expected[name][2], name
            ours, theirs = torch.tensor(logits), torch.tensor(expected[name][1])
            assert torch.allclose(ours, theirs, atol=1e-4), name


def test_each_process_has_its_heads_and_its_keys(both):
    (_, whole), shares = both
    assert [share["heads"] for share in shares] == [2, 2]
    assert [share["groups"] for share in shares] == [2, 2]
    keys = [set(whole), *(set(share["kept"]) for share in shares)]
    assert not (keys[0] & keys[1])
    assert not (keys[0] & keys[2])
    assert not (keys[1] & keys[2])
    assert all(all(share["kept"].values()) for share in shares)
    assert all(len(each) == 4 for each in keys)


def test_sums_are_the_same_bits_in_each(both):
    assert [share["summed"][0] for share in both[1]] == [3.0, 3.0]
    assert both[1][0]["summed"] == both[1][1]["summed"]
    assert both[1][0]["summed"][1] == pytest.approx(0.8)


def test_weights_of_another_process_are_part_of_a_key(both):
    for share in both[1]:
        before, after = share["keys"]
        assert before != after


def test_what_one_process_has_lost_is_compiled_by_both(both):
    first, second = (share["forgotten"] for share in both[1])
    assert first == second
    _, hits, same_keys, lacked = first
    assert hits == [False] * 3
    assert same_keys
    assert lacked == 3


def test_what_one_process_finds_damaged_is_compiled_by_both(both):
    first, second = (share["damaged"] for share in both[1])
    assert first == second
    whole, mended, compiled = first
    assert whole[1] == compiled[1] == [True] * 3
    assert mended[1] == [True, False, True]
    assert whole[0] == mended[0] == compiled[0]


def test_no_room_in_one_process_is_an_error_in_both(both):
    (there, first), (here, second) = (share["full"] for share in both[1])
    assert ["another of the processes" in said for said in there] == [True] * 2
    assert ["does not fit a store of 64 bytes" in said for said in here] == [True] * 2
    assert first == second


def test_a_self_check_that_fails_in_one_process_fails_in_both(both):
    there, here = (share["check"] for share in both[1])
    assert "another of the processes" in there
    assert "self-check of" in here


def test_a_recording_of_some_heads_is_refused(both):
    for share in both[1]:
        assert "record with the model in one process" in share["refused"]
