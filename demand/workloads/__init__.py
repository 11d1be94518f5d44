"""Streams of jobs: Poisson arrivals of any applications, and two ready mixes."""

from demand.workloads.bimodal import bimodal_applications, bimodal_mix
from demand.workloads.hermes import hermes_applications, hermes_mix
from demand.workloads.workload import Application, Workload, poisson_workload

__all__ = [
    "Application",
    "Workload",
    "bimodal_applications",
    "bimodal_mix",
    "hermes_applications",
    "hermes_mix",
    "poisson_workload",
]
