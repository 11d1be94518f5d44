"""The former path of `sparsity.Policy` and what belongs to it; goes with the next release."""

from sparsity.former_paths import names_moved
from sparsity.policies import base

__getattr__ = names_moved(__name__, base, ("Needs", "PageView", "Policy"))
