"""What is timed (bench_*.py), how (harness.py, rates.py), against whom (peers.py), and what is kept (records.py)."""
