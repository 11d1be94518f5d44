"""Learn what an application needs from its runs, rank one that is running, and schedule by it.

python examples/schedule_by_demand.py
"""

from demand import (
    FCFS,
    ClassMean,
    Execution,
    Gittins,
    Oracle,
    PDGraph,
    Progress,
    Unit,
    bimodal_mix,
    simulate,
)

# A coding agent: it writes, runs, and writes again in half of its runs.
write, run = Unit("write", "llm"), Unit("run", "container")
once = [Execution(write, input_tokens=600, output_tokens=200), Execution(run, seconds=12.0)]
graph = PDGraph.fit([once, once + once], name="coding agent")
print(graph, graph.remaining(), sep="\n")

# The same agent after its first draft, 5 seconds into the container.
remaining = graph.remaining(Progress(executed=(once[0],), current="run", attained_seconds=5.0))
print(f"{remaining}\nGittins rank {remaining.gittins():.1f} s\n")

# Applications that are short nine times out of ten: where ranks by age pay.
workload = bimodal_mix(load=0.9, jobs=3000, seed=0)
for policy in (FCFS(), ClassMean(), Gittins(), Oracle()):
    print(simulate(workload, policy))
