"""Bounds of the merge that the settings check before anything is loaded."""

MAX_PAIRWISE_LEAVES = 20_000
"""Single and complete linkage hold all distances: 1.6 GB at this size, four times as much at twice the size."""
