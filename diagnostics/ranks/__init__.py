"""Several processes: what spreads a network over them, and whether they agree."""
