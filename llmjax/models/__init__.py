"""Model families; each is a function of a Batch."""
