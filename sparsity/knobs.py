"""The former path of `sparsity.Evicting`; goes with the next release."""

from sparsity.former_paths import names_moved
from sparsity.policies import evicting

__getattr__ = names_moved(__name__, evicting, ("Evicting",))
