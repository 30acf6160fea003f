"""A run folder: markers, lease, signals, artifacts."""
