"""Attacks on a chunk store: what it gives is right, and it goes on giving. See `__main__`."""
