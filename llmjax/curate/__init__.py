"""The data room: from raw text to a corpus that can be trusted. Measure every document, decide, write."""
