"""Everything that depends on transformers: the model, its attention, and its caches."""
