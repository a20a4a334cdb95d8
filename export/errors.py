"""Errors of checkpoints and builds."""

from latentrt.errors import UserError


class ConfigError(UserError, ValueError):
    """config.json says something that this family or this project does not know."""


class CheckpointError(UserError, ValueError):
    """A file or tensor of the checkpoint is missing, extra, misshapen, wrongly typed, truncated or not finite."""


class BuildError(UserError, RuntimeError):
    """The build cannot be done as asked (unknown target, precision that the target lacks, a used output folder)."""
