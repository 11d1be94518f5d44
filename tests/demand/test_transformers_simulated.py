"""Completion steps inside transformers are what the engine simulator says, job by job."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
from continuous_batching import (
    BLOCK_TOKENS,
    BLOCKS,
    COST,
    POLICIES,
    TOKEN_BUDGET,
    WIDTH,
    Served,
    draw_workload,
    tiny_model,
)

from demand.policies import RequestFCFS
from demand.simulation.engine import Engine, simulate_engine


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def workload():
    return draw_workload(jobs=24, load=1.5, seed=1)


def both(model, workload, name, kv):
    """Steps from arrival to completion of each job: measured, simulated."""
    policy, blocks = POLICIES[name], BLOCKS[kv]
    preemption = "none" if policy is None else "pause"
    engine = Engine.counting_steps(WIDTH, TOKEN_BUDGET, blocks, BLOCK_TOKENS, preemption)
    simulated = simulate_engine(workload, policy or RequestFCFS(), engine, cost=COST)
    return Served(model, workload, policy, blocks).run(), simulated


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "FIFO"])
def test_every_job_ends_in_the_step_simulated(model, workload, name):
    measured, simulated = both(model, workload, name, "ample")
    np.testing.assert_array_equal(measured.completion_steps, simulated.completion_times)
    assert measured.steps == simulated.steps
    assert measured.pauses == simulated.preemptions > 0
    assert measured.evictions == 0


@pytest.mark.parametrize("name", ["ClassMean", "Gittins"])
def test_means_agree_when_kv_is_scarce(model, workload, name):
    measured, simulated = both(model, workload, name, "scarce")
    assert measured.evictions > 0
    assert measured.completion_steps.mean() == pytest.approx(simulated.mean, rel=0.03)


def test_fifo_is_request_fcfs_with_ample_kv(model, workload):
    measured, simulated = both(model, workload, "FIFO", "ample")
    np.testing.assert_array_equal(measured.completion_steps, simulated.completion_times)


def test_it_beats_fifo_by_what_is_simulated(model, workload):
    fifo, simulated_fifo = both(model, workload, "FIFO", "ample")
    gittins, simulated_gittins = both(model, workload, "Gittins", "ample")
    share = gittins.completion_steps.mean() / fifo.completion_steps.mean()
    assert share < 0.9
    assert share == pytest.approx(simulated_gittins.mean / simulated_fifo.mean, rel=0.1)
    assert gittins.tokens == fifo.tokens
