"""Dense runs recorded once, and what any policy would have kept of them."""
