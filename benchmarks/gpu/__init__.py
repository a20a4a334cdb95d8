"""Sections of benchmarks/gpu_check.py: each module has functions that take a `Run` and report to it."""
