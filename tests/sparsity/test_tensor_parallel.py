"""Two processes that share a model's heads (gloo, CPU) decode the tokens of one process."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers

from sparsity import SparseCache, SparsityError
from tests.helpers import free_port, random_ids, tiny_model
from tests.sparsity.zoo import TIGHT

PROCESSES = 2
SHAPE = dict(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=8)


def decode(model):
    """Tokens by policy, and what is held of a layer; or the error."""
    ids, results = random_ids(13, 2), {}
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for policy in TIGHT:
        cache = SparseCache(model, policy)
        try:
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=16, do_sample=False, past_key_values=cache
            )
            slots = cache.retentions[1].pool.slots.sort(-1).values  # the pool's order is its own
            results[str(policy)] = out.tolist(), slots.tolist()
        except SparsityError as error:
            results[str(policy)] = str(error)
    return results


def shard_by_hand(model, rank):
    """Each process has its share of heads and of the MLP, and sums what comes out of both."""

    def take(linear, axis):
        part = linear.weight.detach().chunk(PROCESSES, axis)[rank]
        linear.weight = torch.nn.Parameter(part.clone())

    def add(module, args, out):
        dist.all_reduce(out)
        return out

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            take(linear, 0)
        take(mlp.gate_proj, 0)
        take(mlp.up_proj, 0)
        for linear in (attention.o_proj, mlp.down_proj):
            take(linear, 1)
            linear.register_forward_hook(add)
    model._device_mesh = dist.init_device_mesh("cpu", (PROCESSES,))  # as transformers notes it
    return model


def shard_by_transformers(path):
    config = {"tp_plan": "auto"}
    if hasattr(getattr(transformers, "DistributedConfig", None), "tp_plan"):  # the newer way
        config = {"distributed_config": transformers.DistributedConfig(tp_plan="auto")}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **config)


def work(rank, port, folder, ways):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for way in ways:
        if way == "by hand":
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            model = shard_by_hand(model, rank)
        else:
            model = shard_by_transformers(folder)
        with torch.no_grad():
            results[way] = decode(model.eval())
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """What one process decodes, and what each of two does, by the way they share the model."""
    ways, folder = ["by hand"], tmp_path_factory.mktemp("model")
    if find_spec("accelerate") is not None:
        ways.append("transformers")
    model = tiny_model("llama", **SHAPE)
    model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        mp.start_processes(
            work, (free_port(), str(folder), ways), nprocs=PROCESSES, start_method="spawn"
        )
    shares = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return decode(model), {way: [share[way] for share in shares] for way in ways}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["by hand", "transformers"])
def test_two_processes_decode_what_one_does(way, decoded):
    expected, by_way = decoded
    if way not in by_way:
        pytest.skip("transformers shards a model with accelerate only: pip install accelerate")
    shares = by_way[way]
    refused = set()
    for policy in TIGHT:
        parts = [share[str(policy)] for share in shares]
        if getattr(policy, "shared_heads", False):
            refused.add(name := type(policy).__name__)
            for error in parts:
                assert f"{name} with shared_heads=True decides once for all 4" in error
                assert "use shared_heads=False" in error
            continue
        tokens, slots = expected[str(policy)]
        assert [part[0] for part in parts] == [tokens] * PROCESSES, policy
        for row in range(2):
            assert [head for part in parts for head in part[1][row]] == slots[row], policy
    assert refused == {"H2O", "TOVA"}
