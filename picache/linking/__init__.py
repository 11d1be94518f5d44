"""Link compiled chunks into a prompt: fetch and move their KV, recompute the chosen tokens."""
