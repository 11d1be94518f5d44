"""Kernels of one decoding step, each beside a plain twin."""
