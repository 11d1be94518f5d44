"""What a cache holds, whatever the model: pages, what policies decide by, and attention to them."""
