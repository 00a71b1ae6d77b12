"""Benchmarks: what is timed (bench_*.py), how (harness.py, rates.py), against whom (peers.py), what is kept (records.py)."""
