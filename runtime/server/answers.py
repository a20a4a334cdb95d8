"""What chat and text completions share: from a request to answers of the engine, and from their events to usage and ends."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from latentrt.runtime.engine.logprobs import TokenLogprobs
from latentrt.runtime.engine.sequence import Event, GenerationResult
from latentrt.runtime.service import Request

_REASONS = {"stop": "stop", "length": "length", "context": "length", "cache": "length"}


@dataclass
class Answer:
    """One answer as far as it has come."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    result: GenerationResult | None = None

    def take(self, event: Event) -> None:
        """Adds an event; raises the error that ended the request."""
        if event.error:
            raise event.error
        self.text += event.text
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprobs:
            self.logprobs.append(event.logprobs)
        self.result = event.result

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's word for how it ended."""
        return _REASONS[self.result.finish_reason] if self.result else None


class Answers:
    """The answers of one request: `count` prompts with `choices` answers each, in this order."""

    def __init__(self, request: Request, prompts: list[list[int]], choices: int, kind: str):
        self.request, self.prompts, self.choices = request, prompts, choices
        self.id, self.created = f"{kind}-{uuid.uuid4().hex}", int(time.time())
        self.answers = [Answer() for _ in range(len(prompts) * choices)]

    async def events(self) -> AsyncIterator[tuple[Event, Answer]]:
        """Events as they come, each with its answer as far as it goes."""
        async for events in self.request:
            for event in events:
                answer = self.answers[event.index]
                answer.take(event)
                yield event, answer

    async def collect(self) -> list[Answer]:
        """All answers, whole."""
        async for _ in self.events():
            pass
        return self.answers

    def usage(self, unsaid: int = 0) -> dict:
        """What OpenAI's and DeepSeek's APIs count; `unsaid` tokens of each answer are not counted."""
        asked = sum(map(len, self.prompts))
        cached = sum(s.reused for s in self.request.sequences[:: self.choices])
        said = sum(max(len(a.tokens) - unsaid, 0) for a in self.answers)
        return {
            "prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": cached},
            "prompt_cache_hit_tokens": cached, "prompt_cache_miss_tokens": asked - cached,
        }  # fmt: skip
