"""Errors that a user can mend: every message names the thing, what was found, what is accepted, and what to do."""


class ConfigError(ValueError):
    """config.json says something that this family or this project does not know."""


class CheckpointError(ValueError):
    """A file or tensor of the checkpoint is missing, extra, misshapen, wrongly typed, truncated or not finite."""


class BuildError(RuntimeError):
    """The build cannot be done as asked (unknown target, precision that the target lacks, a used output folder)."""
