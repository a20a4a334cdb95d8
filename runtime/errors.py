"""What can go wrong after a bundle is loaded. Problems of the bundle itself are `runtime.bundle.BundleError`."""


class RequestError(ValueError):
    """A request cannot be run as asked: names the thing, what was found, what is accepted."""


class EngineError(RuntimeError):
    """The engine gave an unusable answer, such as logits that are not numbers."""
