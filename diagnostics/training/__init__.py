"""What is followed while a network trains, without a trace in the training."""
