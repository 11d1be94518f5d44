"""Compile documents once, link them in any order, and see what each method recomputes and answers.

python examples/link_documents.py [--model NAME_OR_PATH]
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from picache import PIC, FullRecompute, LegoLink, NaiveReuse

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default=str(Path(__file__).parent / "reference_model"))
name = parser.parse_args().model
model = AutoModelForCausalLM.from_pretrained(name).eval()
tokenizer = AutoTokenizer.from_pretrained(name)

pic = PIC(model, tokenizer)
system = pic.compile("<bos> Read the documents and complete the questions .")
belford = pic.compile("Document : Belford . Belford paints maps . It teaches hats .")
corvale = pic.compile("Document : Corvale . It paints bells . The town teaches songs .")
question = "Questions : Corvale paints"

# Each order is a new prompt; no document is computed twice.
for chunks in ([system, belford, corvale], [system, corvale, belford]):
    for method in (FullRecompute(), NaiveReuse(), LegoLink(k=4)):
        prompt = pic.link(chunks, question, method=method)
        out = model.generate(**prompt, max_new_tokens=1, do_sample=False)
        print(f"{question} {tokenizer.decode(out[0, -1:])}   <- {prompt.report}")
