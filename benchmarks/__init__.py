"""Side-by-side measurements: `python -m benchmarks.suite`, from the root of a clone."""
