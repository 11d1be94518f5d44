"""Probabilistic demand graphs: learned from runs, walked, saved, compared and drawn."""
