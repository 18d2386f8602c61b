"""Long comparisons: the ablation, the paper, the other theories, the calibration of the verdicts."""
