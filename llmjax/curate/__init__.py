"""Curation: from raw text to a corpus. Measure every document, decide, write."""
