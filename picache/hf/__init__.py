"""All that knows transformers: the model as the linker sees it, its attention and its cache."""
