"""Decode a chain of thought densely and under retention policies: what is answered, what is held.

python examples/decode_in_bounded_memory.py [--model NAME_OR_PATH]
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsity import Full, Quest, RaaS, SparseCache, StreamingLLM

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default=str(Path(__file__).parent / "reference_model"))
name = parser.parse_args().model
model = AutoModelForCausalLM.from_pretrained(name).eval()
tokenizer = AutoTokenizer.from_pretrained(name)

definitions = "a1 = 4 ; a2 = 7 ; a3 = a1 + a2 ; a4 = a3 + a2 ; a5 = a4 + a1 ; a6 = a5 + a3 ;"
text = f"<bos> Work out every value modulo ten . Definitions : {definitions} Question : a6 ;"
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)

for policy in (Full(), Quest(64, page_size=8), RaaS(64, page_size=8), StreamingLLM(32)):
    cache = SparseCache(model, policy)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=80, do_sample=False)
    print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]), cache.report(), "", sep="\n")
