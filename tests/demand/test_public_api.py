import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

import demand


def test_exports():
    assert set(demand.__all__) == {
        "FCFS",
        "SERPT",
        "Application",
        "ClassMean",
        "CostModel",
        "DemandError",
        "Distribution",
        "Execution",
        "Gittins",
        "Interval",
        "Job",
        "Oracle",
        "PDGraph",
        "Policy",
        "Progress",
        "RandomOrder",
        "RankTable",
        "SimulationResult",
        "Unit",
        "Workload",
        "bimodal_applications",
        "bimodal_mix",
        "bootstrap_interval",
        "gittins_brute_force",
        "gittins_rank",
        "hermes_applications",
        "hermes_mix",
        "paired_ratio_interval",
        "poisson_workload",
        "simulate",
    }


@pytest.mark.parametrize("name", demand.__all__)
def test_everything_public_is_documented(name):
    public = getattr(demand, name)
    assert inspect.getdoc(public)
    if inspect.isclass(public):
        methods = inspect.getmembers(public, inspect.isfunction)
        assert all(inspect.getdoc(method) for key, method in methods if not key.startswith("_"))


def test_import_loads_only_numpy():
    heavy = "{'torch', 'transformers', 'scipy', 'picache', 'sparsity'}"
    check = f"import sys, demand; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_policies_are_frozen():
    for policy in (demand.FCFS(), demand.Gittins()):
        with pytest.raises(FrozenInstanceError):
            policy.setting = 1
        assert policy == type(policy)()


def test_errors_are_value_errors():
    assert issubclass(demand.DemandError, ValueError)
