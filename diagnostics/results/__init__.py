"""What was found, as values: numbers with errors, tables, fits. They print and export and know no network."""
