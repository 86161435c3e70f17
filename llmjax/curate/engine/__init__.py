"""Measure, decide and write, on one machine or many."""
