"""The tables and figures of arXiv 2604.11639, reproduced and corrected."""
