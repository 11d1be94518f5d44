"""Sweeps on a Ray cluster: the results of one process, errors, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

import picache
import sparsity
from demand import DemandError, Gittins, RandomOrder, bimodal_mix, compare
from demand.sweep import spread
from tests.helpers import free_port, tiny_model
from tests.picache.test_compare import tokenizer_of
from tests.sparsity.test_compare import TEXTS, numbered_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import sweeps  # noqa: E402 - the examples are scripts, not a package


@pytest.fixture(scope="module")
def cluster():
    with sweeps.cluster(2) as address:
        yield address


def where(item):
    return item * item, os.getpid()


def fails(item):
    if item == 5:
        raise KeyError(item)
    return item


def draw(seed):
    return bimodal_mix(load=0.8, jobs=40, seed=seed)


def test_results_are_those_of_one_process_in_order(cluster, capfd):
    found = list(spread(where, range(41), cluster))
    assert [square for square, _ in found] == [item * item for item in range(41)]
    processes = {process for _, process in found}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert "41/41" in capfd.readouterr().err


def test_comparisons_are_those_of_one_process(cluster):
    given = dict(progress=False, also=["p99_seconds"])
    alone, there = (
        compare(draw, [Gittins(), RandomOrder()], range(4), workers=workers, **given)
        for workers in (1, cluster)
    )
    assert there.to_json() == alone.to_json()


@pytest.mark.parametrize("workers", [2, "ray"])  # by the connection that demand has made
def test_comparisons_of_models_are_those_of_one_process(cluster, workers):
    assert workers == 2 or ray.is_initialized()
    again = cluster if workers == "ray" else workers  # by its address, too
    model = tiny_model("llama", vocab_size=6000)  # a mebibyte and more: memory that workers map
    problems = [
        picache.Problem(("the cat sits", "the dog sleeps"), "where is the cat", ("on the mat",)),
        picache.Problem(("the bird sings", "a roof"), "who sings", ("the bird",)),
    ]
    metrics = ["accuracy", "f1", "nll", "extra_nll", "kl", "agreement", "recomputed"]
    given = dict(new_tokens=4, metrics=metrics, progress=False)
    ways = [picache.LegoLink(2), picache.NaiveReuse()]
    alone = picache.compare(model, tokenizer_of(), problems, ways, **given)
    there = picache.compare(model, tokenizer_of(), problems, ways, workers=workers, **given)
    assert there.to_json() == alone.to_json()
    policies = [sparsity.RaaS(24, page_size=4), sparsity.Random(24)]
    metrics = ["extra_nll", "kl", "agreement", "kept_bytes"]
    given = dict(prompt_tokens=8, metrics=metrics, progress=False)
    tokenizer = numbered_tokenizer()
    alone = sparsity.compare(model, tokenizer, TEXTS, policies, **given)
    there = sparsity.compare(model, tokenizer, TEXTS, policies, workers=again, **given)
    assert there.to_json() == alone.to_json()


def test_an_error_keeps_its_kind_and_names_the_cell(cluster):
    with pytest.raises(KeyError, match="the cell is seed 5"):
        list(spread(fails, range(9), cluster, named=lambda i: f"seed {i}", progress=False))
    assert list(spread(fails, range(4), cluster, progress=False)) == [0, 1, 2, 3]


def seen_gpus(item):
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_a_worker_sees_no_gpu(cluster):
    assert list(spread(seen_gpus, range(2), cluster, progress=False)) == [""] * 2


def test_a_connection_that_another_made_is_not_taken_for_the_address(cluster):
    assert next(spread(fails, range(4), cluster, progress=False)) == 0
    ray.shutdown()
    ray.init(cluster)
    with pytest.raises(DemandError, match="connected to a Ray cluster already: give workers"):
        list(spread(fails, range(4), cluster, progress=False))
    ray.shutdown()
    assert next(spread(fails, range(4), cluster, progress=False)) == 0


def test_a_connection_to_another_cluster_is_not_taken_for_the_address():
    """Both connections are the first of their cluster, and jobs of the same number."""
    with sweeps.cluster(1) as one, sweeps.cluster(1) as other:
        ray.shutdown()
        assert next(spread(fails, range(4), one, progress=False)) == 0
        number = ray.get_runtime_context().get_job_id()
        ray.shutdown()
        ray.init(other)
        assert ray.get_runtime_context().get_job_id() == number
        with pytest.raises(DemandError, match="connected to a Ray cluster already: give workers"):
            list(spread(fails, range(4), one, progress=False))


def test_another_address_is_refused_where_one_is_connected(cluster):
    assert next(spread(fails, range(4), cluster, progress=False)) == 0
    with pytest.raises(DemandError, match="connected to a Ray cluster already: give workers"):
        list(spread(fails, range(4), "ray://127.0.0.1:1", progress=False))


UNTIL_INTERRUPTED = """
import os, sys, time
from pathlib import Path
from demand.sweep import spread

def cell(item, folder=Path(sys.argv[2])):
    (folder / str(os.getpid())).touch()
    time.sleep(600)

try:
    list(spread(cell, range(8), sys.argv[1], progress=False))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def interrupted(workers: str, folder: Path) -> None:
    """Ctrl-C in a sweep of cells that take ten minutes: it ends, and so do its workers."""
    command = [sys.executable, "-c", UNTIL_INTERRUPTED, workers, str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    sweep = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        _until(lambda: len(list(folder.iterdir())) == 2, 120)
        working = [int(file.name) for file in folder.iterdir()]
        sweep.send_signal(signal.SIGINT)
        out, _ = sweep.communicate(timeout=60)
        assert "interrupted" in out
        _until(lambda: not any(_lives(process) for process in working), 30)
    finally:
        sweep.kill()


def test_an_interrupt_ends_processes(tmp_path):
    interrupted("2", tmp_path)


def test_an_interrupt_ends_the_workers_of_a_cluster(cluster, tmp_path):
    interrupted(cluster, tmp_path)


def killed(item):
    if item == 3:
        time.sleep(3)  # until what came before has arrived
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_worker_that_is_killed_ends_the_sweep():
    with pytest.raises(Exception, match="the first cell without a result is cell 3"):
        list(spread(killed, range(4), 2, named=lambda i: f"cell {i}", progress=False))


def test_a_cluster_that_is_not_there_is_said_to_be_missing():
    code = (
        "import sys\nfrom demand.sweep import spread\n"
        "list(spread(abs, [1], sys.argv[1], progress=False))"
    )
    command = [sys.executable, "-c", code, f"ray://127.0.0.1:{free_port()}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "DemandError: workers='ray://127.0.0.1:" in done.stderr
    assert "expected the client server of a Ray cluster" in done.stderr


def _until(holds, seconds):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def _lives(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False
