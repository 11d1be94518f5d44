"""What the progress of a run says of the demand that remains, one method a file."""

from typing import Any

from demand.arguments import moved_attribute
from demand.refine.base import Estimator, Refined, Refinement
from demand.refine.current_unit import CurrentUnit
from demand.refine.log_ridge import LogFit, LogRidge
from demand.refine.nearest import NearestRuns
from demand.refine.no_refinement import NoRefinement
from demand.refine.pearson import PearsonFilter
from demand.refine.predictor import PendingCall, Predictor
from demand.refine.prompt_regression import PromptRegression
from demand.refine.regression import ProgressRegression
from demand.refine.whole_runs import WholeRuns

_MOVED: dict[str, tuple[str, Any]] = {"Refine": ("demand.refine.Estimator", Estimator)}


def __getattr__(name: str) -> Any:
    """Names of before, for one release."""
    return moved_attribute(__name__, name, _MOVED)


__all__ = [
    "CurrentUnit",
    "Estimator",
    "LogFit",
    "LogRidge",
    "NearestRuns",
    "NoRefinement",
    "PearsonFilter",
    "PendingCall",
    "Predictor",
    "ProgressRegression",
    "PromptRegression",
    "Refined",
    "Refinement",
    "WholeRuns",
]
