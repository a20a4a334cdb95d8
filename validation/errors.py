"""Errors that end a validation without a verdict: every message says what was found, what is needed, and what to do."""

from latentrt.errors import UserError


class ValidationError(UserError, ValueError):
    """The bundle, the checkpoint and the text do not make a comparison (exit status 2)."""


class ReferenceRefused(ValidationError):  # noqa: N818 (it says what happens)
    """transformers does not compute what the checkpoint's config.json says; nothing may be compared with it."""
