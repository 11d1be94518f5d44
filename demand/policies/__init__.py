"""Scheduling policies behind one protocol: `Policy` ranks a `Job`, the smallest rank first."""

from typing import Any

from demand.arguments import moved_attribute
from demand.distribution.never_seen import NEVER_SEEN, known_of
from demand.policies.aging import Aging
from demand.policies.base import Policy, Rank
from demand.policies.class_mean import ClassMean
from demand.policies.deadline_mix import DeadlineMix
from demand.policies.decaying_las import DecayingLAS
from demand.policies.fcfs import EDF, FCFS, Oracle, RandomOrder, RequestFCFS
from demand.policies.gittins import Gittins
from demand.policies.hysteresis import Hysteresis
from demand.policies.job import Job, Service
from demand.policies.kv_time import kv_time
from demand.policies.las import LAS
from demand.policies.least_slack import LeastSlack
from demand.policies.mlfq import MLFQ
from demand.policies.priority_classes import PriorityClasses
from demand.policies.serpt import SERPT
from demand.policies.time_slice import TimeSlice
from demand.policies.virtual_time import VirtualTime
from demand.policies.vtc import VTC

_MOVED: dict[str, tuple[str, Any]] = {"Quantum": ("demand.policies.TimeSlice", TimeSlice)}


def __getattr__(name: str) -> Any:
    """Names of before, for one release."""
    return moved_attribute(__name__, name, _MOVED)


__all__ = [
    "EDF",
    "FCFS",
    "LAS",
    "MLFQ",
    "NEVER_SEEN",
    "SERPT",
    "VTC",
    "Aging",
    "ClassMean",
    "DeadlineMix",
    "DecayingLAS",
    "Gittins",
    "Hysteresis",
    "Job",
    "LeastSlack",
    "Oracle",
    "Policy",
    "PriorityClasses",
    "RandomOrder",
    "Rank",
    "RequestFCFS",
    "Service",
    "TimeSlice",
    "VirtualTime",
    "known_of",
    "kv_time",
]
