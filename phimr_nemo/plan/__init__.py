"""The planner: memory, step time and cost of a stage before a GPU is touched. Needs no torch."""
