"""The former path of `sparsity.Thresholds`; goes with the next release."""

from sparsity.former_paths import names_moved
from sparsity.recorded import milestones

__getattr__ = names_moved(__name__, milestones, ("Thresholds",))
