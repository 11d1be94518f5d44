"""All that knows transformers: the cache, its layers, and how a model is attached to it."""
