"""Model sizes for a compute budget, and the cost of a model."""
