"""Whether a checkpoint is the one that something was made of."""

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models.base import Config
from latentrt.validation.errors import ValidationError

_NOT_COMPUTED = {"tie_word_embeddings", "eos_token_id", "bos_token_id", "max_position_embeddings"}  # change no number


def check_pair(theirs: Config, source: str, checkpoint: Checkpoint) -> None:
    """The checkpoint must fit its own config.json, and that must be `theirs`, which was made from `source`. ValidationError."""
    checkpoint.check()
    ours = checkpoint.config
    for field in ("model_type", *type(ours).model_fields):
        found, expected = getattr(ours, field), getattr(theirs, field, None)
        if found != expected and field not in _NOT_COMPUTED:
            raise ValidationError(
                f"{checkpoint.path}: {field} is {found!r}, the bundle's model has {expected!r}; "
                f"give the checkpoint that the bundle was built from ({source})"
            )
