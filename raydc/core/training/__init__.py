"""Fitting: rows, epochs, k-means on codes, refinement, checkpoints."""
