"""Import and export of Hugging Face checkpoints: one mapping per family, read and written tensor by tensor."""
