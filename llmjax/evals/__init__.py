"""Evaluation of checkpoints on the splits of a token store."""
