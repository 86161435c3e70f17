"""Measurements and repairs of one text at a time."""
