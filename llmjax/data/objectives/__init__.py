"""What a model predicts: packed rows to batches."""
