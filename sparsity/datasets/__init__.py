"""Public data sets of reasoning as `sparsity.Problem`s: from the Hugging Face hub, or from a file.

    problems = load("math500", limit=100)
    problems = load("gsm8k", limit=100, path="test.jsonl")
    sparsity.compare(model, tokenizer, problems, policies, right=sparsity.grader.same_value)

The hub, and files other than JSON, need the library `datasets`, which is imported when it is needed
first (``pip install 'picache[datasets]'``).
"""

from sparsity.datasets.load import load
from sparsity.datasets.table import DATASETS, DataSet

__all__ = ["DATASETS", "DataSet", "load"]
