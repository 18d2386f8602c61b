"""What the graph alone says of blocks: paths, gains, bounds, ranks, radii, where skips belong."""
