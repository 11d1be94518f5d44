"""Public data sets as `picache.Problem`s: from the Hugging Face hub, or from a file of your own.

    problems = load("hotpotqa", limit=100)
    problems = load("hotpotqa", limit=100, path="hotpot_dev_distractor_v1.json")

The hub, and files other than JSON, need the library `datasets`, which is imported when it is needed
first (``pip install 'picache[datasets]'``).
"""

from picache.datasets.load import among, load
from picache.datasets.needles import needles
from picache.datasets.table import DATASETS, DataSet

__all__ = ["DATASETS", "DataSet", "among", "load", "needles"]
