"""The litellm package."""

import litellm

litellm.telemetry = False
litellm.suppress_debug_info = True


def completion(**asked):
    """A chat; a stream as the list of its chunks."""
    answer = litellm.completion(**asked)
    return [chunk.model_dump(mode="json") for chunk in answer] if asked.get("stream") else answer.model_dump(mode="json")


def text_completion(**asked) -> dict:
    return litellm.text_completion(**asked).model_dump(mode="json")
