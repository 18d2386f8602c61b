"""The captured network: one run cut into nodes, and the local derivatives of each node."""
