"""Link documents, decode behind them in bounded memory, and serve by what applications will need.

python examples/all_three.py [--model NAME_OR_PATH]
"""

import argparse
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from demand import Execution, PDGraph, Unit
from picache import PIC, LegoLink
from sparsity import RaaS, SparseCache

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default=str(Path(__file__).parent / "reference_model"))
name = parser.parse_args().model
model = AutoModelForCausalLM.from_pretrained(name).eval()
tokenizer = AutoTokenizer.from_pretrained(name)

pic = PIC(model, tokenizer)
system = pic.compile("<bos> Read the documents and complete the questions .")
belford = pic.compile("Document : Belford . Belford paints maps . It teaches hats .")
corvale = pic.compile("Document : Corvale . It paints bells . The town teaches songs .")
link, decode = Unit("link", "llm"), Unit("decode", "llm")
new_tokens = {"report": 96, "lookup": 4}  # one application writes much, the other little


def serve(application: str) -> list[Execution]:
    """Run an application on the model; what it did, with the seconds it took."""
    begun = time.perf_counter()
    prompt = pic.link([system, corvale, belford], "Questions : Corvale paints", LegoLink(k=4))
    linked = time.perf_counter()
    cache = SparseCache(model, RaaS(budget=64, page_size=8), past=prompt["past_key_values"])
    model.generate(
        **{**prompt, "past_key_values": cache},
        max_new_tokens=new_tokens[application],
        min_new_tokens=new_tokens[application],
        do_sample=False,
    )
    return [
        Execution(link, seconds=linked - begun),
        Execution(decode, seconds=time.perf_counter() - linked),
    ]


serve("report")  # the first calls of a process are slow
known = {name: PDGraph.fit([serve(name) for _ in range(3)], name=name) for name in new_tokens}
ranks = {name: graph.remaining().gittins() for name, graph in known.items()}
print(*known.values(), {name: f"rank {rank:.3f} s" for name, rank in ranks.items()}, sep="\n")

arrived = ["report", "lookup", "lookup", "report", "lookup"]
for policy, order in {"FCFS": arrived, "Gittins": sorted(arrived, key=ranks.__getitem__)}.items():
    begun, completion = time.perf_counter(), []
    for application in order:
        serve(application)
        completion.append(time.perf_counter() - begun)
    print(f"{policy:8} mean completion {sum(completion) / len(completion):.3f} s of {arrived}")
