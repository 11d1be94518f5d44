"""The old place of `picache.arms` and `picache.Arm`; it goes with the next release."""

import warnings

from picache.methods.presets import Arm, arms

__all__ = ["Arm", "arms"]

warnings.warn(
    "picache.presets has moved: import arms and Arm from picache", DeprecationWarning, stacklevel=2
)
