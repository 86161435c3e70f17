"""Checkpoints: saved asynchronously, verified by fingerprint."""
