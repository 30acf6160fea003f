"""The weighted tree above the leaves: linkage, order, cuts, exports."""
