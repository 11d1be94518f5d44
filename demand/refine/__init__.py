"""What the progress of a run says of the demand that remains, one method a file."""

from demand.refine.base import Refine, Refined, Refinement
from demand.refine.current_unit import CurrentUnit
from demand.refine.log_ridge import LogFit, LogRidge
from demand.refine.nearest import NearestRuns
from demand.refine.no_refinement import NoRefinement
from demand.refine.pearson import PearsonFilter
from demand.refine.predictor import PendingCall, Predictor
from demand.refine.prompt_regression import PromptRegression
from demand.refine.regression import ProgressRegression
from demand.refine.whole_runs import WholeRuns

__all__ = [
    "CurrentUnit",
    "LogFit",
    "LogRidge",
    "NearestRuns",
    "NoRefinement",
    "PearsonFilter",
    "PendingCall",
    "Predictor",
    "ProgressRegression",
    "PromptRegression",
    "Refine",
    "Refined",
    "Refinement",
    "WholeRuns",
]
