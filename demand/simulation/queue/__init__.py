"""The queue simulator: jobs on one or more servers, preempted at no cost."""
