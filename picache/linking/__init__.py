"""From a plan to a prompt: fetch compiled chunks, place them, recompute, report."""
