"""Thin scripts over the package and benchmarks."""
