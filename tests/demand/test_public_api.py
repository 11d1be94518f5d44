import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

import demand


def test_exports():
    assert set(demand.__all__) == {
        "Aging",
        "Application",
        "CalibrationReport",
        "ClassMean",
        "ClosedLoop",
        "CostAwarePlanner",
        "CostModel",
        "CurrentUnit",
        "DeadlineMix",
        "DemandError",
        "DemandEstimator",
        "Distribution",
        "DriftReport",
        "EDF",
        "Engine",
        "EngineResult",
        "Execution",
        "FCFS",
        "Gittins",
        "GivenUnit",
        "Hysteresis",
        "Interval",
        "Job",
        "LAS",
        "LeastSlack",
        "NEVER_SEEN",
        "NearestRuns",
        "NoRefinement",
        "Oracle",
        "PDGraph",
        "PearsonFilter",
        "Policy",
        "Pool",
        "PrewarmPlanner",
        "PriorityClasses",
        "Progress",
        "ProgressRegression",
        "Quantum",
        "RandomOrder",
        "RankTable",
        "Refinement",
        "RequestFCFS",
        "Result",
        "SERPT",
        "SimulationResult",
        "Unit",
        "VTC",
        "VirtualTime",
        "WholeRuns",
        "Workload",
        "bimodal_applications",
        "bimodal_mix",
        "bootstrap_interval",
        "calibrate",
        "closed_loop",
        "drift",
        "gittins_brute_force",
        "gittins_rank",
        "heavy_tailed_applications",
        "heavy_tailed_mix",
        "hermes_applications",
        "hermes_mix",
        "jain_index",
        "known_of",
        "paired_ratio_interval",
        "poisson_workload",
        "rank_many",
        "recorded_applications",
        "simulate",
        "simulate_engine",
        "with_arrivals",
        "with_deadlines",
    }


@pytest.mark.parametrize("name", demand.__all__)
def test_everything_public_is_documented(name):
    public = getattr(demand, name)
    assert inspect.getdoc(public)
    if inspect.isclass(public):
        methods = inspect.getmembers(public, inspect.isfunction)
        assert all(inspect.getdoc(method) for key, method in methods if not key.startswith("_"))


def test_import_loads_only_numpy():
    heavy = "torch transformers scipy networkx matplotlib httpx2 openai picache sparsity"
    check = (
        f"import sys, demand; found = set('{heavy}'.split()) & set(sys.modules); assert not found"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_policies_are_frozen():
    for policy in (demand.FCFS(), demand.Gittins()):
        with pytest.raises(FrozenInstanceError):
            policy.setting = 1
        assert policy == type(policy)()


def test_errors_are_value_errors():
    assert issubclass(demand.DemandError, ValueError)
