"""Traces of real systems, read to one schema as a stream; docs/traces.md has the formats.

for session in read_agent_sessions("sessions.jsonl.gz"):
    graph.observe(session.run(leave_out=("human",)))
"""

from demand.traces.agent_sessions import read_agent_sessions
from demand.traces.azure import read_azure
from demand.traces.bailian import read_bailian
from demand.traces.burstgpt import read_burstgpt
from demand.traces.fields import MalformedRecordError
from demand.traces.fireact import read_fireact
from demand.traces.hermes_artifact import read_hermes_artifact
from demand.traces.kv_cache_tester import read_kv_cache_tester
from demand.traces.llmcompiler import read_llmcompiler, read_llmcompiler_plans
from demand.traces.mini_swe_agent import read_mini_swe_agent
from demand.traces.mooncake import read_mooncake
from demand.traces.opentelemetry import read_opentelemetry
from demand.traces.profiles import ApplicationProfile, StageProfile
from demand.traces.schema import Request, Session, Span
from demand.traces.swe_agent import read_swe_agent
from demand.traces.taskbench import read_taskbench
from demand.traces.tau_bench import read_tau_bench
from demand.traces.trace import Trace
from demand.traces.tracelab import read_tracelab
from demand.traces.vidur import read_vidur

__all__ = [
    "ApplicationProfile",
    "MalformedRecordError",
    "Request",
    "Session",
    "Span",
    "StageProfile",
    "Trace",
    "read_agent_sessions",
    "read_azure",
    "read_bailian",
    "read_burstgpt",
    "read_fireact",
    "read_hermes_artifact",
    "read_kv_cache_tester",
    "read_llmcompiler",
    "read_llmcompiler_plans",
    "read_mini_swe_agent",
    "read_mooncake",
    "read_opentelemetry",
    "read_swe_agent",
    "read_taskbench",
    "read_tau_bench",
    "read_tracelab",
    "read_vidur",
]
