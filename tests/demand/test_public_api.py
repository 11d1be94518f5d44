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
        "CallbackBackend",
        "ClassMean",
        "ClosedLoop",
        "ClusterResult",
        "Comparison",
        "CostAwarePlanner",
        "CostModel",
        "CurrentUnit",
        "DeadlineMix",
        "DecayingLAS",
        "DemandError",
        "DemandEstimator",
        "Distribution",
        "DriftReport",
        "EDF",
        "Engine",
        "EngineResult",
        "Execution",
        "ExpectedDemand",
        "FCFS",
        "Gittins",
        "GivenUnit",
        "Hysteresis",
        "Interval",
        "Job",
        "JobMaker",
        "LAS",
        "LeastLoaded",
        "LeastSlack",
        "MLFQ",
        "NEVER_SEEN",
        "NearestRuns",
        "NoRefinement",
        "Oracle",
        "PDGraph",
        "PearsonFilter",
        "PendingCall",
        "Policy",
        "Pool",
        "Predictor",
        "PrefixAffinity",
        "PrewarmPlanner",
        "Prewarming",
        "PriorityClasses",
        "Progress",
        "ProgressRegression",
        "PromptRegression",
        "TimeSlice",
        "RandomEngine",
        "RandomOrder",
        "RankTable",
        "Refinement",
        "RequestFCFS",
        "Result",
        "Router",
        "SERPT",
        "SimulationResult",
        "Unit",
        "VTC",
        "VirtualTime",
        "WeightedScores",
        "WholeRuns",
        "Workload",
        "bimodal_applications",
        "bimodal_mix",
        "bootstrap_interval",
        "calibrate",
        "calibrate_calls",
        "closed_loop",
        "compare",
        "drift",
        "gittins_rank",
        "heavy_tailed_applications",
        "heavy_tailed_mix",
        "hermes_applications",
        "hermes_mix",
        "jain_index",
        "paired_ratio_interval",
        "poisson_workload",
        "rank_many",
        "recorded_applications",
        "simulate",
        "simulate_cluster",
        "simulate_engine",
        "with_arrivals",
        "with_deadlines",
    }


def test_exports_are_listed_once_and_by_the_steps_of_their_use():
    assert len(set(demand.__all__)) == len(demand.__all__)
    steps = ["PDGraph", "PearsonFilter", "Distribution", "Gittins", "simulate", "PrewarmPlanner"]
    at = [demand.__all__.index(name) for name in steps]
    assert at == sorted(at)


def test_the_lines_of_use_in_the_docstring_run(capsys):
    unit = demand.Unit("plan", "tool")
    run = [demand.Execution(unit, seconds=s) for s in (1.0, 2.0, 3.0)]
    lines = [line.strip() for line in demand.__doc__.splitlines() if line.startswith("    ")]
    scope = {**vars(demand), "runs": [run], "run": run}
    exec("\n".join(lines).replace("load=0.8", "load=0.8, jobs=50"), scope)
    assert 0.0 < scope["rank"] <= scope["demand"].mean() * (1.0 + 1e-12)
    assert float(capsys.readouterr().out) > 0.0


@pytest.mark.parametrize("name", demand.__all__)
def test_everything_public_is_documented(name):
    public = getattr(demand, name)
    assert inspect.getdoc(public)
    if inspect.isclass(public):
        methods = inspect.getmembers(public, inspect.isfunction)
        assert all(inspect.getdoc(method) for key, method in methods if not key.startswith("_"))


def test_import_loads_only_numpy():
    heavy = "torch transformers scipy networkx matplotlib tqdm httpx2 openai picache sparsity"
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
