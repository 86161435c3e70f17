"""Error analysis: what a model gets wrong on a task, and why."""
