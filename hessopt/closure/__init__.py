"""One evaluation of the loss: the closure protocol, its trials, and the loss's curvature on the tape it leaves."""
