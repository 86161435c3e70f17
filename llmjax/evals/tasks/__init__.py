"""Evaluation tasks on the user's own files."""
