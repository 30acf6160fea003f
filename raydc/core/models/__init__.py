"""What a fit learns: networks, heads, mixtures, preprocessing."""
