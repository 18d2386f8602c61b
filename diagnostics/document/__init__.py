"""A report as one JSON document, and the verdicts on it; no network is needed to read one."""
