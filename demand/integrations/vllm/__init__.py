"""The policies of `demand` with vLLM, on two levels.

`AdmissionController` stands in front of any OpenAI-compatible server and decides which call is
sent next; it needs the package openai. `make_scheduler` makes a scheduler class that vLLM runs
inside its engine, where it can also preempt a running request for a better one; it needs vLLM.
"""

from demand.integrations.plans import PlanError, Planned
from demand.integrations.vllm.admission import AdmissionController, Counts
from demand.integrations.vllm.annotation import annotation
from demand.integrations.vllm.call import Call
from demand.integrations.vllm.failures import CallError, Retry, StreamBrokenError
from demand.integrations.vllm.priorities import millisecond_priority
from demand.integrations.vllm.run import Run
from demand.integrations.vllm.scheduler import make_scheduler
from demand.integrations.vllm.server import Server

__all__ = [
    "AdmissionController",
    "Call",
    "CallError",
    "Counts",
    "PlanError",
    "Planned",
    "Retry",
    "Run",
    "Server",
    "StreamBrokenError",
    "annotation",
    "make_scheduler",
    "millisecond_priority",
]
