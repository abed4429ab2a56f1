"""Benchmarks against the libraries that the kernels replace, measured in the same run."""
