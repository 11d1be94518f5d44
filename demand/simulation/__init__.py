"""Simulators: a queue with servers, and an engine that serves requests in batches."""
