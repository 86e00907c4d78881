"""Prepares data sets for the benchmarks from public packages, and one from rules of our own."""
