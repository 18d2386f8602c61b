"""The blocks between nodes, or between groups of parameters, by products and random probes."""
