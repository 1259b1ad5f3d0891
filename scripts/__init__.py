"""Command line: one module a verb of `argot`, and benchmarks."""
