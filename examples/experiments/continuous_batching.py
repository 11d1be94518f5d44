"""Policies inside transformers' continuous batching, against what the engine simulator predicts.

    python examples/experiments/continuous_batching.py --out docs/results

A seeded mix of short and long applications arrives at a tiny random model that serves 4 requests at
once: `answer` makes one call, mostly short; `report` makes three calls side by side and one over
their results; `agent` alternates calls and tools. Time is counted in steps of the engine, which the
script drives itself, so that arrivals fall on exact steps and every number can be reproduced.
FIFO is transformers' own scheduler. Each policy is run with ample KV and with scarce KV, where
requests have to be evicted; `simulate_engine` serves the same runs. Every policy must generate the
same tokens. Writes `continuous_batching.json`.
"""

import argparse
import json
import logging
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import ContinuousBatchingConfig, LlamaConfig, LlamaForCausalLM

from demand import (
    FCFS,
    SERPT,
    ClassMean,
    CostModel,
    Execution,
    Gittins,
    Oracle,
    PDGraph,
    Policy,
    Unit,
    Workload,
)
from demand.integrations.transformers import JobTable, RankScheduler, install
from demand.policies import RequestFCFS
from demand.simulation.engine import Engine, simulate_engine

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
import demand_tables
from environment import environment

COST = CostModel(prefill_seconds_per_token=0.0, decode_seconds_per_token=1.0)
"""A second is a step: a decoded token costs one, a prompt that fits the budget none of its own."""

POLICIES: dict[str, Policy | None] = {
    "FIFO": None,
    "FCFS": FCFS(),
    "ClassMean": ClassMean(),
    "SERPT": SERPT(),
    "Gittins": Gittins(),
    "Oracle": Oracle(),
}
WIDTH, BLOCK_TOKENS, TOKEN_BUDGET = 4, 16, 512
BLOCKS = {"ample": 512, "scarce": 12}


def draw_run(application: str, rng: np.random.Generator) -> list[Execution]:
    """What one application executes."""

    def call(unit: str, low: int, high: int, calls: int = 1) -> Execution:
        prompt, output = rng.integers(8, 25), rng.integers(low, high + 1)
        return Execution(Unit(unit, "llm"), float(prompt), float(output), calls)

    if application == "answer":
        return [call("answer", 4, 12) if rng.random() < 0.8 else call("answer", 100, 160)]
    if application == "report":
        return [call("read", 6, 12, calls=3), call("write", 12, 24)]
    run = [call("think", 6, 12)]
    while rng.random() < 0.6:
        run += [Execution(Unit("tool", "tool"), seconds=float(rng.integers(5, 16)))]
        run += [call("think", 6, 12)]
    return run


def draw_workload(jobs: int, load: float, seed: int) -> Workload:
    """Applications that arrive in a Poisson stream, on whole steps."""
    training, rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    names = ("answer", "report", "agent")
    graphs = {
        name: PDGraph.fit([draw_run(name, training) for _ in range(300)], name=name, cost=COST)
        for name in names
    }
    applications = rng.choice(names, size=jobs).tolist()
    runs = [draw_run(name, rng) for name in applications]
    tokens = sum(e.parallelism * e.output_tokens for run in runs for e in run) / jobs
    arrivals = np.floor(np.cumsum(rng.exponential(tokens / (WIDTH * load), size=jobs)))
    return Workload(
        arrivals,
        [COST.run_seconds(run) for run in runs],
        applications,
        {name: graph.remaining() for name, graph in graphs.items()},
        load,
        runs=runs,
        graphs=graphs,
    )


@dataclass
class Measured:
    """What became of the jobs of one run, in steps."""

    completion_steps: np.ndarray
    tokens: dict[tuple[int, int, int], list[int]]
    steps: int
    pauses: int | None = None  # FIFO does not say
    evictions: int | None = None


class Served:
    """One workload in the continuous batching of transformers, driven step by step."""

    def __init__(
        self, model: LlamaForCausalLM, workload: Workload, policy: Policy | None, blocks: int
    ) -> None:
        self.model, self.workload, self.policy = model, workload, policy
        self.config = ContinuousBatchingConfig(
            page_size=BLOCK_TOKENS,
            num_blocks=blocks,
            max_batch_tokens=TOKEN_BUDGET,
            max_requests_per_batch=WIDTH,
            allow_block_sharing=False,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        self.now = 0
        self.table = JobTable(
            policy or FCFS(), workload.distributions, cost=COST, clock=lambda: float(self.now)
        )
        self.events: list[tuple[float, int]] = []  # step and job whose next unit starts
        self.jobs: dict[int, object] = {}
        self.at = dict.fromkeys(range(len(workload)), -1)
        self.live: dict[str, tuple[int, int, int]] = {}  # request: job, unit, call
        self.measured = Measured(np.zeros(len(workload)), {}, 0)

    def run(self) -> Measured:
        """Serve everything."""
        with install(self.table) as name:
            self.config.scheduler_type = "fifo" if self.policy is None else name
            self.manager = self.model.init_continuous_batching(
                deepcopy(self.model.generation_config), self.config
            )
            # What its thread does, done here.
            processor = self.manager._create_batch_processor()  # noqa: SLF001
        self.manager.batch_processor, self.manager.current_batch = processor, 0
        for index, arrival in enumerate(self.workload.arrivals):
            self._later(arrival, index)
        while self.events or self.live:
            while self.events and self.events[0][0] <= self.now:
                self._start_unit(heappop(self.events)[1])
            if not self.live:
                if self.events:
                    self.now = int(self.events[0][0])
                continue
            before = self.manager.current_batch
            self.manager._generation_loop_body(processor, False)  # noqa: SLF001
            self.now += self.manager.current_batch - before
            while (output := self.manager.get_result()) is not None:
                self._end_request(output)
        self.measured.steps = self.manager.current_batch
        if isinstance(scheduler := processor.scheduler, RankScheduler):
            self.measured.pauses, self.measured.evictions = scheduler.pauses, scheduler.evictions
        return self.measured

    def _later(self, step: float, index: int) -> None:
        heappush(self.events, (step, index))

    def _start_unit(self, index: int) -> None:
        run = self.workload.runs[index]
        if self.at[index] == -1:
            self.jobs[index] = self.table.open(
                self.workload.applications[index], demand_seconds=self.workload.demands[index]
            )
        elif run[self.at[index]].unit.kind == "tool":
            self.table.serve(self.jobs[index], run[self.at[index]].seconds)
        self.at[index] += 1
        at = self.at[index]
        if at == len(run):
            self.measured.completion_steps[index] = self.now - self.workload.arrivals[index]
            self.table.close(self.jobs[index])
        elif run[at].unit.kind == "tool":
            self._later(self.now + run[at].seconds, index)
        else:
            for call in range(run[at].parallelism):
                self._request(index, at, call, run[at])

    def _request(self, index: int, at: int, call: int, execution: Execution) -> None:
        generator = torch.Generator().manual_seed(10_000 * index + 100 * at + call)
        size = (int(execution.input_tokens),)
        prompt = torch.randint(3, self.model.config.vocab_size, size, generator=generator)
        request_id = f"{index}/{at}/{call}"
        self.table.announce(self.jobs[index], request_id)
        self.live[request_id] = (index, at, call)
        self.manager.add_request(
            prompt.tolist(), request_id, max_new_tokens=int(execution.output_tokens)
        )

    def _end_request(self, output) -> None:
        if output.error is not None:
            raise RuntimeError(f"request {output.request_id} failed: {output.error}")
        index, at, call = self.live.pop(output.request_id)
        self.measured.tokens[index, at, call] = output.generated_tokens
        if not any(other[0] == index for other in self.live.values()):
            self._later(self.now, index)


def tiny_model() -> LlamaForCausalLM:
    """A random Llama that no end-of-sequence token stops."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def compare(model: LlamaForCausalLM, jobs: int, load: float, seed: int) -> list[dict]:
    """One row for each policy and amount of KV."""
    workload = draw_workload(jobs, load, seed)
    rows, tokens = [], None
    for kv, blocks in BLOCKS.items():
        for name, policy in POLICIES.items():
            measured = Served(model, workload, policy, blocks).run()
            if tokens is not None and measured.tokens != tokens:
                raise RuntimeError(f"{name} with {kv} KV generated other tokens than FIFO")
            tokens = measured.tokens
            preemption = "none" if policy is None else "pause"
            engine = Engine.counting_steps(WIDTH, TOKEN_BUDGET, blocks, BLOCK_TOKENS, preemption)
            simulated = simulate_engine(workload, policy or RequestFCFS(), engine, cost=COST)
            rows.append(
                {
                    "seed": seed,
                    "kv": kv,
                    "policy": name,
                    "measured_mean_steps": float(measured.completion_steps.mean()),
                    "simulated_mean_steps": simulated.mean,
                    "jobs_alike": float(
                        (measured.completion_steps == simulated.completion_times).mean()
                    ),
                    "steps": measured.steps,
                    "simulated_steps": simulated.steps,
                    "pauses": measured.pauses,
                    "evictions": measured.evictions,
                }
            )
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Means over the seeds, and how far measured and simulated are apart."""
    table = []
    for kv in BLOCKS:
        fifo = None
        for name in POLICIES:
            mine = [row for row in rows if row["kv"] == kv and row["policy"] == name]
            measured = float(np.mean([row["measured_mean_steps"] for row in mine]))
            simulated = float(np.mean([row["simulated_mean_steps"] for row in mine]))
            fifo = fifo or (measured, simulated)
            table.append(
                {
                    "kv": kv,
                    "policy": name,
                    "measured_mean_steps": measured,
                    "simulated_mean_steps": simulated,
                    "measured_share_of_fifo": measured / fifo[0],
                    "simulated_share_of_fifo": simulated / fifo[1],
                    "measured_over_simulated": measured / simulated,
                    "worst_seed_apart": max(
                        abs(row["measured_mean_steps"] / row["simulated_mean_steps"] - 1.0)
                        for row in mine
                    ),
                    "jobs_alike": float(np.mean([row["jobs_alike"] for row in mine])),
                    **{
                        count: sum(row[count] for row in mine)
                        for count in ("pauses", "evictions")
                        if mine[0][count] is not None
                    },
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=80)
    parser.add_argument("--load", type=float, default=1.2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny tensors: more threads are slower
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model, rows = tiny_model(), []
    for seed in tqdm(range(arguments.seeds)):
        rows += compare(model, arguments.jobs, arguments.load, seed)
    result = {
        "configuration": {
            "jobs": arguments.jobs,
            "load": arguments.load,
            "seeds": arguments.seeds,
            "width": WIDTH,
            "block_tokens": BLOCK_TOKENS,
            "token_budget": TOKEN_BUDGET,
            "blocks": BLOCKS,
            "cost": asdict(COST),
        },
        "environment": environment(),
        "table": summary(rows),
        "rows": rows,
    }
    print(demand_tables.continuous_batching(result))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / "continuous_batching.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
