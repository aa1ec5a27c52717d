"""Command-line tools around the course: running notebooks, benchmarks, the table of errors."""
