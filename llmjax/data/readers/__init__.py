"""Reading files of text and of records: decompression, formats by content, records, documents."""
