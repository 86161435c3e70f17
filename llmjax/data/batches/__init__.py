"""From a token store to batches."""
