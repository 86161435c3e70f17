"""Read files of text and records: decompression, format detection, records, documents."""
