"""Optimizers by name, their schedules, and their state per layer."""
