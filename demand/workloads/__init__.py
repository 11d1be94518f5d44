"""Workloads: applications, generated or recorded, and when their jobs arrive and are due."""

from demand.workloads.arrivals import with_arrivals
from demand.workloads.bimodal import bimodal_applications, bimodal_mix
from demand.workloads.closed_loop import ClosedLoop, closed_loop
from demand.workloads.deadlines import DEADLINE_FACTORS, with_deadlines
from demand.workloads.heavy_tailed import heavy_tailed_applications, heavy_tailed_mix
from demand.workloads.hermes import hermes_applications, hermes_mix
from demand.workloads.profiled import profiled_applications
from demand.workloads.recorded import recorded_applications
from demand.workloads.workload import Application, Workload, poisson_workload

__all__ = [
    "DEADLINE_FACTORS",
    "Application",
    "ClosedLoop",
    "Workload",
    "bimodal_applications",
    "bimodal_mix",
    "closed_loop",
    "heavy_tailed_applications",
    "heavy_tailed_mix",
    "hermes_applications",
    "hermes_mix",
    "poisson_workload",
    "profiled_applications",
    "recorded_applications",
    "with_arrivals",
    "with_deadlines",
]
