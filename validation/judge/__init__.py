"""Numbers, tolerances and the verdict."""
