"""Checkpoints of Hugging Face transformers, in and out: one mapping per family, read and written tensor by tensor."""
