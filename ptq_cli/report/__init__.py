"""What is said of a run: rows, totals, gates, documents, pages."""
