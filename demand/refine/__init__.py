"""What the progress of a run says of the demand that remains, one method a file."""

from demand.refine.base import Refine, Refined, Refinement
from demand.refine.current_unit import CurrentUnit
from demand.refine.nearest import NearestRuns
from demand.refine.no_refinement import NoRefinement
from demand.refine.pearson import PearsonFilter
from demand.refine.regression import ProgressRegression
from demand.refine.whole_runs import WholeRuns

__all__ = [
    "CurrentUnit",
    "NearestRuns",
    "NoRefinement",
    "PearsonFilter",
    "ProgressRegression",
    "Refine",
    "Refined",
    "Refinement",
    "WholeRuns",
]
