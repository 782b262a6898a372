"""Measuring what merging gains: cases, gates, clocks, counts and tables."""
