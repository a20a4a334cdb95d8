"""What can go wrong with a bundle, with a request, and with an engine that runs."""

from latentrt.errors import UserError


class BundleError(UserError, ValueError):
    """The bundle cannot be used: what was found, what is needed, what to do."""


class RequestError(UserError, ValueError):
    """A request cannot be run as asked: names the thing, what was found, what is accepted."""


class EngineError(UserError, RuntimeError):
    """The engine gave an unusable answer, such as logits that are not numbers."""


class StepMemoryError(EngineError, MemoryError):
    """A step needs more memory than is free; a smaller one may run."""


class EngineLostError(EngineError):
    """The engine cannot run another step, such as after a fault of its GPU: it has to be loaded again."""
