"""One idea a script."""
