"""From files to batches: what is trained on, in which order, with which random numbers. Knows no model."""
