"""Benchmarks that anyone can repeat: `python -m benchmarks NAME`, or `make bench` for all of them."""
