"""/v1/completions: text that goes on, from texts or token ids; with a suffix, what belongs in between."""

import asyncio
from collections.abc import AsyncIterator

from latentrt.runtime.api import Engine
from latentrt.runtime.errors import RequestError
from latentrt.runtime.server import logprobs
from latentrt.runtime.server.answers import Answer, Answers
from latentrt.runtime.server.protocol import CompletionRequest
from latentrt.runtime.server.sampling import sampling_params
from latentrt.runtime.server.streaming import sse
from latentrt.runtime.service import Ask, EngineService

DEFAULT_TOKENS = 16  # OpenAI's
FIM = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"  # Coder-V2's: around prefix and suffix


class Completion:
    """One request; see `of`."""

    answers: Answers

    def __init__(self, engine: Engine, model: str, body: CompletionRequest, prompts: list[list[int]]):
        self._engine, self._model, self._body, self._prompts = engine, model, body, prompts
        self._texts = [self._prompt_text(n, tokens) if body.echo else "" for n, tokens in enumerate(prompts)]

    @classmethod
    async def of(cls, service: EngineService, model: str, body: CompletionRequest) -> "Completion":
        """A request whose answers are on their way. Raises RequestError and what EngineService.submit raises.

        Tokenizes in a thread: a long prompt may take a while.
        """
        if body.best_of is not None and body.best_of > (body.n or 1):
            raise RequestError(f"best_of is {body.best_of}, accepted: up to n, {body.n or 1}; ask for more answers with n")
        if body.max_tokens == 0 and not body.echo:
            raise RequestError("max_tokens is 0, accepted: 1 or more, or 0 with echo")
        prompts = await asyncio.to_thread(prompt_tokens, service.engine, body)
        asked, choices = cls(service.engine, model, body, prompts), range(body.n or 1)
        asks = [Ask(tokens, asked._params(tokens, n), body.cache_salt or "") for tokens in prompts for n in choices]
        asked.answers = Answers(await service.submit(asks), prompts, len(choices), "cmpl")
        return asked

    @property
    def _unsaid(self) -> int:
        """Tokens at the end that nobody asked for: an engine gives one at least."""
        return 1 if self._body.max_tokens == 0 else 0

    def _params(self, tokens: list[int], choice: int):
        body, room = self._body, self._engine.limits.max_context - len(tokens)
        asked = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        told = body.logprobs if body.echo else None
        return sampling_params(self._engine, body, min(asked, room), choice, body.logprobs, told)

    def _prompt_text(self, n: int, tokens: list[int]) -> str:
        given = self._body.prompt
        texts = [given] if isinstance(given, str) else given
        if isinstance(texts[0], str):
            return texts[n]
        return self._engine.tokenizer.decode(tokens, skip_special=False) if self._engine.tokenizer else ""

    async def respond(self) -> dict:
        """The whole answer."""
        answers = await self.answers.collect()
        choices = [self._choice(n, answer) for n, answer in enumerate(answers)]
        return self._head() | {"choices": choices, "usage": self.answers.usage(self._unsaid)}

    async def stream(self) -> AsyncIterator[bytes]:
        """Chunks: what one step brought, for all answers."""
        body, sent = self._body, [0] * len(self.answers.answers)  # tokens
        lengths = [0] * len(sent)  # characters
        options = body.stream_options
        usage = options and options.include_usage and options.continuous_usage_stats
        async for event, answer in self.answers.events():
            n = event.index
            first = not sent[n] and body.echo
            text = (self._texts[n // self.answers.choices] if first else "") + (event.text if not self._unsaid else "")
            choice = self._part(n, answer, text, sent[n], lengths[n], bool(event.result))
            sent[n], lengths[n] = len(answer.tokens), lengths[n] + len(text)
            yield sse(self._head() | {"choices": [choice]} | ({"usage": self.answers.usage(self._unsaid)} if usage else {}))
        if options and options.include_usage:
            yield sse(self._head() | {"choices": [], "usage": self.answers.usage(self._unsaid)})

    def _head(self) -> dict:
        answers = self.answers
        return {"id": answers.id, "object": "text_completion", "created": answers.created, "model": self._model}

    def _choice(self, n: int, answer: Answer) -> dict:
        text = self._texts[n // self.answers.choices] + ("" if self._unsaid else answer.text)
        return self._part(n, answer, text, 0, 0, True)

    def _part(self, n: int, answer: Answer, text: str, since: int, offset: int, ended: bool) -> dict:
        """A choice whose tokens before `since` and `offset` characters are with the client already."""
        choice = {"index": n, "text": text, "logprobs": None, "finish_reason": answer.finish_reason if ended else None}
        if ended:
            choice["stop_reason"] = answer.result.stopped_by
        if self._body.logprobs is not None:
            choice["logprobs"] = self._logprobs(n, answer, since, offset)
        return choice

    def _logprobs(self, n: int, answer: Answer, since: int, offset: int) -> dict:
        end = len(answer.tokens) - self._unsaid
        tokens, told = answer.tokens[since:end], answer.logprobs[since:end]
        if self._body.echo and not since:
            sequence = self.answers.request.sequences[n]
            tokens = self.answers.prompts[n // self.answers.choices] + tokens
            told = [*sequence.prompt_logprobs, *told]
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return logprobs.for_completion(self._engine.tokenizer, tokens, told, offset, as_ids)


def prompt_tokens(engine: Engine, body: CompletionRequest) -> list[list[int]]:
    """Checked token ids of all prompts. Raises RequestError."""
    given = body.prompt
    alone = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    prompts = [given] if alone else given
    if not prompts:
        raise RequestError("prompt is an empty list; give a text, token ids, or a list of them")
    if body.suffix:
        return [_fim_tokens(engine, prompt, body.suffix) for prompt in prompts]
    special = body.add_special_tokens is not False
    named = [(prompt, "prompt" if alone else f"prompt {n}") for n, prompt in enumerate(prompts)]
    if special:
        return [engine.prompt_tokens(prompt, where) for prompt, where in named]
    tokenizer = engine.needed_tokenizer()
    plain = [tokenizer.encode(p, special=False) if isinstance(p, str) else p for p in prompts]
    return [engine.prompt_tokens(tokens, where) for tokens, (_, where) in zip(plain, named, strict=True)]


def _fim_tokens(engine: Engine, prompt: str | list[int], suffix: str) -> list[int]:
    tokenizer = engine.needed_tokenizer()
    marks = [tokenizer.token_id(mark) for mark in FIM]
    if None in marks:
        raise RequestError(f"suffix needs a tokenizer with {', '.join(FIM)}, as Coder-V2's; this model's has none")
    if not isinstance(prompt, str):
        raise RequestError("suffix beside token ids; give the prompt as text")
    begin, hole, end = marks
    bos = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    texts = [tokenizer.encode(text, special=False) for text in (prompt, suffix)]
    return engine.prompt_tokens([*bos, begin, *texts[0], hole, *texts[1], end])
