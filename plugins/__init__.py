"""The custom ops of the step graph. One folder per op; `op.py` is its contract, every other form derives from it."""
