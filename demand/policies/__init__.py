"""Scheduling policies behind one protocol, one policy a file."""

from demand.policies.base import Job, Policy
from demand.policies.class_mean import ClassMean
from demand.policies.fcfs import FCFS
from demand.policies.gittins import Gittins
from demand.policies.oracle import Oracle
from demand.policies.random_order import RandomOrder
from demand.policies.serpt import SERPT

__all__ = ["FCFS", "SERPT", "ClassMean", "Gittins", "Job", "Oracle", "Policy", "RandomOrder"]
