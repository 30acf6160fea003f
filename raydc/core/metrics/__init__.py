"""Metrics from sums: contingency, scores, agreement, verdict."""
