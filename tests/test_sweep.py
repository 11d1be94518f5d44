"""Sweeps over processes: the results of one process, and errors that say of which cell.

On a Ray cluster, and what is interrupted or killed: `tests/machines`, run by `.ci/ray`.
"""

import gc
import importlib
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from demand import DemandError, Gittins, RandomOrder, bimodal_mix, compare, sweep
from demand.sweep import spread

ROOT = Path(__file__).parents[1]
ERRORS = {"picache": "PICacheError", "sparsity": "SparsityError", "demand": "DemandError"}

joblib = pytest.importorskip("joblib", reason="needs joblib: pip install joblib")


def test_the_copies_are_one_file():
    texts = {p: (ROOT / p / "sweep.py").read_text().replace(e, "Error") for p, e in ERRORS.items()}
    assert len({text.replace(f"from {p}.", "from p.") for p, text in texts.items()}) == 1


def square(item):
    """What a cell draws is drawn by the seed in it."""
    return item, float(np.random.default_rng(item).normal())


def whose(item):
    return os.getpid()


def test_results_are_those_of_one_process_in_order(capfd):
    items = list(range(23))
    alone = list(spread(square, items, progress=False))
    assert capfd.readouterr().err == ""
    assert list(spread(square, items, "2")) == alone
    assert "23/23" in capfd.readouterr().err
    assert os.getpid() not in spread(whose, items, 2, progress=False)
    assert list(spread(square, [], 2, progress=False)) == []


class TooMuchError(Exception):
    """What cannot be unpickled: it is made of two things, and gives one on."""

    def __init__(self, item, limit):
        super().__init__(f"{item} is above {limit}")


def fails(kind, item):
    if item == 5:
        raise kind(item, 4) if kind is TooMuchError else kind(item)
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_keeps_its_kind_and_names_the_cell(workers):
    given = dict(workers=workers, named=lambda item: f"seed {item}", progress=False)
    with pytest.raises(KeyError, match="the cell is seed 5") as raised:
        list(spread(partial(fails, KeyError), range(9), **given))
    assert raised.value.args == (5,)
    kind = TooMuchError if workers == 1 else DemandError
    with pytest.raises(kind, match="5 is above 4") as raised:
        list(spread(partial(fails, TooMuchError), range(9), **given))
    assert "seed 5" in str(raised.value) + str(raised.value.__notes__)
    assert list(spread(square, range(3), 2, progress=False))[2][0] == 2  # the next sweep works


class CodedError(Exception):
    """It says itself how it is pickled, and leaves out its notes."""

    def __reduce__(self):
        return CodedError, self.args


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_that_pickles_itself_keeps_its_notes(workers):
    def cell(item):
        if item == 3:
            error = CodedError(item)
            error.add_note("of the cell's own")
            raise error
        return item

    with pytest.raises(CodedError, match="the cell is seed 3") as raised:
        list(spread(cell, range(5), workers, named=lambda item: f"seed {item}", progress=False))
    assert raised.value.__notes__ == ["of the cell's own", "the cell is seed 3"]


def test_an_error_of_a_class_that_no_module_has_keeps_its_kind():
    class OwnError(Exception):
        """As one of a script or a notebook is."""

    def cell(item):
        if item == 1:  # one alone: of two errors, either may be the first to arrive
            raise OwnError(item)
        return item

    with pytest.raises(OwnError, match="the cell is 1"):
        list(spread(cell, range(2), 2, progress=False))


def test_cells_run_in_processes_whatever_joblib_was_set_to():
    with joblib.parallel_config(backend="threading"):
        assert os.getpid() not in spread(whose, range(3), 2, progress=False)


def test_a_sweep_inside_a_cell_stays_in_its_worker():
    def cell(item):
        return os.getpid(), set(spread(whose, range(3), 2, progress=False))

    for process, inside in spread(cell, range(2), 2, progress=False):
        assert inside == {process}
    assert not sweep._WORKER.in_cell


class Model:
    """It refers to itself, as models do."""

    def __init__(self):
        self.itself = self


def served(model, item):
    sweep.IDLE = 0.1  # seconds, in this worker
    time.sleep(0.05)
    return os.getpid()


def models(item):
    """How many there are in a process."""
    time.sleep(0.05)
    return os.getpid(), sum(type(one) is Model for one in gc.get_objects())


def test_a_worker_lets_go_of_the_task_of_a_sweep_that_is_over():
    processes = set(spread(partial(served, Model()), range(6), 2, progress=False))
    end = time.monotonic() + 30
    while True:
        with joblib.Parallel(2, backend="loky") as pool:  # the same processes, outside of a sweep
            left = dict(pool(joblib.delayed(models)(item) for item in range(6)))
        assert set(left) & processes
        if not any(left.values()):
            break
        assert time.monotonic() < end, "a worker has the model still"


def test_folders_of_an_environment_are_told_by_their_parts():
    paths = ["/env/lib", "/env", "/environment/code", "/code"]
    assert sweep._own_folders(paths, ["/env"]) == ["/environment/code", "/code"]


def test_a_comparison_is_that_of_one_process():
    def draw(seed):
        return bimodal_mix(load=0.8, jobs=40, seed=seed)

    given = dict(progress=False, also=["p99_seconds"])
    alone, shared = (
        compare(draw, [Gittins(), RandomOrder()], range(3), workers=workers, **given)
        for workers in (1, 2)
    )
    assert shared.to_json() == alone.to_json()
    assert len(set(alone.measured["RandomOrder"]["mean_seconds"])) == 3


def test_a_comparison_says_which_run_failed():
    def draw(seed):
        if seed == 2:
            raise OSError("the disk is gone")
        return bimodal_mix(load=0.8, jobs=9, seed=seed)

    for workers in (1, 2):
        with pytest.raises(OSError, match="of seed 2, when the jobs were drawn"):
            compare(draw, [Gittins()], range(4), workers=workers, progress=False)


@pytest.mark.parametrize("package", ERRORS)
@pytest.mark.parametrize("workers", [0, -1, 1.5, True, None, "four", "", "ray://", "dask://a:1"])
def test_workers_that_are_none_are_refused(package, workers):
    refusal = getattr(importlib.import_module(f"{package}.errors"), ERRORS[package])
    module = importlib.import_module(f"{package}.sweep")
    with pytest.raises(refusal, match=r"workers is .*; expected how many processes, such as 4"):
        list(module.spread(square, [1], workers))


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DemandError, match=r"needs Ray, which is not installed: pip install") as one:
        list(spread(square, [1], "ray://127.0.0.1:10001"))
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(
        DemandError, match="needs joblib and cloudpickle, which are not both inst"
    ) as two:
        list(spread(square, [1], 2))
    assert "\n" not in str(one.value) + str(two.value)
    assert list(spread(square, [1], progress=False))  # one process needs neither


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(DemandError, match=r"cannot be pickled \(TypeError.*or workers=1"):
        list(spread(partial(max, (i for i in ())), [1], 2))
