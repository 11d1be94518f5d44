"""Scheduling policies behind one protocol, one policy a file."""

from demand.policies.aging import Aging
from demand.policies.base import Job, Policy, Rank
from demand.policies.class_mean import ClassMean
from demand.policies.deadline_mix import DeadlineMix
from demand.policies.edf import EDF
from demand.policies.fcfs import FCFS
from demand.policies.gittins import Gittins
from demand.policies.hysteresis import Hysteresis
from demand.policies.las import LAS
from demand.policies.least_slack import LeastSlack
from demand.policies.oracle import Oracle
from demand.policies.priority_classes import PriorityClasses
from demand.policies.quantum import Quantum
from demand.policies.random_order import RandomOrder
from demand.policies.request_fcfs import RequestFCFS
from demand.policies.serpt import SERPT
from demand.policies.unknown import NEVER_SEEN, known_of
from demand.policies.virtual_time import VirtualTime
from demand.policies.vtc import VTC

__all__ = [
    "EDF",
    "FCFS",
    "LAS",
    "NEVER_SEEN",
    "SERPT",
    "VTC",
    "Aging",
    "ClassMean",
    "DeadlineMix",
    "Gittins",
    "Hysteresis",
    "Job",
    "LeastSlack",
    "Oracle",
    "Policy",
    "PriorityClasses",
    "Quantum",
    "RandomOrder",
    "Rank",
    "RequestFCFS",
    "VirtualTime",
    "known_of",
]
