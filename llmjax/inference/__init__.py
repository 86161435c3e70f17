"""Text from checkpoints: continuations of prompts, predictions of masked tokens."""
