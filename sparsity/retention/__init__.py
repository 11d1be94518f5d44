"""What a cache holds, whatever model it serves: pages, their evidence, and attention to them."""
