"""Read inputs of curation: archives, pages and records in any encoding."""
