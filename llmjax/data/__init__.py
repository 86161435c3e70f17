"""Data: documents, token stores, batches and objectives."""
