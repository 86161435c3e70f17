"""The commands of `llmjax`, one file each."""
