"""Polygraphy over bundles: a runner, inputs of steps, and `polygraphy run --latentrt`. Needs the extra `polygraphy`."""
