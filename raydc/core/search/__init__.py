"""k-means and nearest-center search."""
