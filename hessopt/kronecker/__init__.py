"""Newton steps with running averages, in a band of layers."""
