"""Model sizes for a compute budget, the cost of a model, and steps compiled ahead of time for a machine."""
