"""The curvature of the parameters by products over batches of data."""
