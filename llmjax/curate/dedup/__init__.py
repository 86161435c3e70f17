"""Find duplicates, and documents of evaluation sets."""
