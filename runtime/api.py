"""The Python API: load a bundle, generate text, read logits.

`latentrt.load("BUNDLE").generate(["def main():", "import"], SamplingParams(max_new_tokens=32))` is all it takes.
"""

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path

import numpy as np

from latentrt.plugins.step_graph import LOGITS
from latentrt.runtime import backends
from latentrt.runtime.backends.base import Backend
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.engine.loop import EngineLoop, Stream
from latentrt.runtime.engine.sequence import Event, GenerationResult, Sequence
from latentrt.runtime.errors import BundleError, RequestError
from latentrt.runtime.sampling_params import SamplingParams
from latentrt.runtime.structured import Guides
from latentrt.runtime.text_stream import TextStream
from latentrt.runtime.tokenizer import Tokenizer

Prompt = str | Items[int]


class Engine:
    """A loaded target of a bundle, and a context manager. Streams may be interleaved, and pulled by several threads: they
    share the steps."""

    def __init__(self, bundle: Bundle, backend: Backend, chunk: int | None = None, drafts: int = 0):
        self.bundle, self.backend = bundle, backend
        self.limits = backend.target.limits
        self.vocab_size = _vocab_size(bundle, backend)
        self.tokenizer = Tokenizer.of(bundle)
        self.eos_ids = frozenset(end.id for end in bundle.manifest.text.end_of_text)
        self.default_params = SamplingParams(**bundle.manifest.text.sampling)  # the checkpoint's own
        self.loop = EngineLoop(backend, chunk, drafts)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Gives back what the engine holds. No request may follow."""
        self.loop.close()

    def generate(
        self, prompts: Items[Prompt], params: SamplingParams | Items[SamplingParams] | None = None,
        on_token: Callable[[Event], None] | None = None,
    ) -> list[GenerationResult]:  # fmt: skip
        """Answers to prompts (texts, or lists of token ids), in their order; `on_token` sees every event as it comes.

        params: one for all, or one for each; without them `default_params`, the checkpoint's own.
        Raises RequestError before anything runs if a prompt is empty, too long, has ids outside the vocabulary, or if
        the number of params differs. Raises the first EngineError, after the other requests have ended, if logits are no
        numbers or a step fails.
        """
        results = {}
        for event in self.stream(prompts, params):
            if on_token:
                on_token(event)
            if event.result:
                results[event.index] = event.result
        return [results[index] for index in range(len(results))]

    def stream(self, prompts: Items[Prompt], params: SamplingParams | Items[SamplingParams] | None = None) -> Stream:
        """Like `generate`, as events: one per token. Closing the iterator ends the requests. Checks at once, not lazily.

        A request that fails has its error in its last event, and the others go on; the first error is raised in the end.
        """
        sink: deque[Event] = deque()
        chosen = self._params(prompts, params)
        tokens = [self.prompt_tokens(prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
        sequences = [self.sequence(t, p, sink, index) for index, (t, p) in enumerate(zip(tokens, chosen, strict=True))]
        return self.loop.stream(sequences)

    def logits(self, token_lists: Items[Items[int]]) -> np.ndarray:
        """Teacher-forced logits at all positions of all lists, one list after another: [T, vocab_size] float32."""
        blocks, row = self.logit_blocks(token_lists), 0
        out = np.empty((sum(map(len, token_lists)), self.vocab_size), np.float32)
        for block in blocks:
            out[row : row + len(block)] = block
            row += len(block)
        return out

    def logit_blocks(self, token_lists: Items[Items[int]]) -> Iterator[np.ndarray]:
        """The rows of `logits` in blocks [rows, vocab_size] of at most 256, so that they need not fit into memory."""
        lists = [self.prompt_tokens(tokens, f"token list {index}") for index, tokens in enumerate(token_lists)]
        return self.loop.logit_blocks(lists)

    def sequence(self, tokens: list[int], params: SamplingParams, sink: deque[Event], index: int = 0, salt: str = ""):
        """The state of a new request for checked tokens; for `loop.stream`."""
        if params.stop and self.tokenizer is None:
            raise RequestError(f"stop strings need a tokenizer, {self.bundle.path} has none; give no stop strings")
        wrong = [t for t in (*params.stop_token_ids, *(t for t, _ in params.logit_bias)) if t >= self.vocab_size]
        if wrong:
            given = f"stop_token_ids or logit_bias has token {wrong[0]}"
            raise RequestError(f"{given}, accepted: 0 to {self.vocab_size - 1} (vocab_size)")
        guide = self.guides.guide(params.constraint) if params.constraint else None
        return Sequence(index, tokens, params, self._text(params), self.eos_ids, sink, salt, guide)

    @cached_property
    def guides(self) -> Guides:
        """Grammars that answers may have to follow. BundleError without a tokenizer."""
        return Guides(self.needed_tokenizer(), self.vocab_size, self.eos_ids)

    def _text(self, params: SamplingParams) -> TextStream | None:
        known = self.tokenizer
        if known is None:
            return None
        skip = params.skip_special_tokens
        hidden = known.hidden_tokens if params.stop and skip else {}
        return TextStream(partial(known.decode, skip_special=skip), params.stop, hidden, known.text_bytes(skip))

    def prompt_tokens(self, prompt: Prompt, where: str = "prompt") -> list[int]:
        """Checked token ids of a prompt. Raises RequestError that calls it `where`."""
        tokens = self._encode(prompt, where) if isinstance(prompt, str) else _integers(prompt, where)
        if not tokens:
            wanted = "give some text" if isinstance(prompt, str) else "give one token id or more"
            raise RequestError(f"{where} is empty; {wanted}")
        wrong = next((i for i, t in enumerate(tokens) if not 0 <= t < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"{where}: token {wrong} is {tokens[wrong]}, accepted: 0 to {self.vocab_size - 1} (vocab_size)")
        longest, capacity = self.limits.max_context, self.loop.schedulers.capacity
        if len(tokens) > longest:
            raise RequestError(f"{where} has {len(tokens)} tokens, accepted: up to {longest} (max_context); shorten it")
        if len(tokens) > capacity:
            raise RequestError(f"{where} has {len(tokens)} tokens, the latent cache holds {capacity}; raise cache_tokens")
        return tokens

    def chat_tokens(
        self, messages: list[dict], where: str = "the conversation", tools: list[dict] | None = None,
        template: str | None = None, add_generation_prompt: bool = True, continue_final: bool = False,
    ) -> list[int]:  # fmt: skip
        """Checked token ids of a conversation of {"role", "content"} messages, up to where the answer begins.

        `tools` and `template` are those of Tokenizer.render_chat. continue_final: the answer goes on with the last message.
        """
        options = template, add_generation_prompt, continue_final
        return self.prompt_tokens(self.needed_tokenizer().encode_chat(messages, tools, *options), where)

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer; BundleError if there is none."""
        if self.tokenizer is None:
            raise BundleError(f"{self.bundle.path}: has no tokenizer; give token ids, or build from a checkpoint with one")
        return self.tokenizer

    def _encode(self, text: str, where: str) -> list[int]:
        try:
            return self.needed_tokenizer().encode(text)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None

    def _params(self, prompts, params) -> Items[SamplingParams]:
        if isinstance(prompts, str) or not isinstance(prompts, Items):
            raise RequestError(f"prompts is {type(prompts).__name__}, accepted: a list of texts or of token-id lists")
        params = self.default_params if params is None else params
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(params)} params for {len(prompts)} prompts; give one, or one for each")
        return params


def _vocab_size(bundle: Bundle, backend: Backend) -> int:
    shape = next((output.shape for output in backend.target.outputs if output.name == LOGITS), [None])
    if not isinstance(shape[-1], int):
        raise BundleError(f"{bundle.path}: target {backend.name} has no output {LOGITS} [N, vocab_size]; build it again")
    return shape[-1]


def _integers(tokens, where: str) -> list[int]:
    if not isinstance(tokens, Items | np.ndarray) or isinstance(tokens, bytes):
        raise RequestError(f"{where} is {type(tokens).__name__}, accepted: text or a list of token ids")
    for place, token in enumerate(tokens):
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise RequestError(f"{where}: token {place} is {token!r}, accepted: integers")
    return [int(token) for token in tokens]


def _check_ranks(name: str, target: Target, ranks: int | None) -> None:
    if ranks not in (None, target.ranks):
        found = f"ranks is {ranks}, but target {name} was built for {target.ranks}"
        raise RequestError(f"{found}; leave it out, or build another bundle with --ranks {ranks}")


def load(
    path: Path | str, target: str | None = None, cache_tokens: int | None = None, threads: int = 0,
    backend: str | None = None, device: str = "auto", drafts: int = 0, ranks: int | None = None,
    batch_invariant: bool = False,
) -> Engine:  # fmt: skip
    """An engine for a target of the bundle at `path` (the only one by default).

    cache_tokens: tokens in the latent cache, by default what 1 GiB holds, 8 full contexts at most; on a GPU what nine
    tenths of its free memory hold. threads: 0 for all cores. backend: the target's own by default; "torch" interprets any
    target's graph. device: "cpu", "cuda" or "cuda:1"; "auto" is what the target is for, and with backend "torch" a GPU where
    there is one. drafts: how many tokens a sequence may guess ahead in a step, from what its text repeats; the answers stay the
    same, and code comes sooner. ranks: the number that the target was built for; it decides how many processes run it, so that
    another one is refused. batch_invariant: a request's tokens and logits do not depend, bit for bit, on what else runs, when
    it came, or how its prompt was cut (docs/numerics.md); cpu targets only, and slower. Raises BundleError if the bundle or the
    target cannot be used, RequestError for a wrong option.
    """
    bundle = Bundle(path)
    _check_ranks(*bundle.target(target), ranks)
    if drafts < 0:
        raise RequestError(f"drafts is {drafts}, accepted: 0 (none) or more")
    options = {"cache_tokens": cache_tokens, "threads": threads, "device": device, "batch_invariant": batch_invariant}
    try:
        loaded = backends.load(bundle, target, backend, **options)
    except MemoryError as error:
        raise RequestError(f"cache_tokens is {cache_tokens}, more than this machine's memory holds ({error})") from None
    return Engine(bundle, loaded, drafts=drafts)
