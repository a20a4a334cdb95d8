"""A conversation: every turn renders the whole history with the chat template, and computes only what is new of it.

The last turn's tokens stay in the latent cache as long as there is room, and the next one begins with the same.
"""

from collections import deque
from collections.abc import Generator

from latentrt.runtime.api import Engine
from latentrt.runtime.engine.sequence import Event, Sequence
from latentrt.runtime.errors import RequestError
from latentrt.runtime.sampling_params import SamplingParams


class Conversation:
    """Messages with an engine. `messages` is the history, as {"role", "content"}.

    Raises BundleError without a tokenizer or a chat template, RequestError if the system message does not fit.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None):
        self._engine, self._params = engine, params
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._system)
        engine.chat_tokens([*self.messages, {"role": "user", "content": ""}])

    def reset(self) -> None:
        """Forgets the history, except for the system message."""
        self.messages = list(self._system)

    def say(self, text: str) -> Generator[Event, None, None]:
        """The answer to a message, as events. Closing the iterator ends the answer; what was said so far is kept.

        Raises RequestError, before anything is kept, if the conversation no longer fits.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            tokens = self._engine.chat_tokens(asked)
        except RequestError as error:
            raise RequestError(f"{error} (/reset begins anew)") from None
        sequence = self._engine.sequence(tokens, self._params, deque())
        return self._answer(asked, sequence)

    def _answer(self, asked: list[dict], sequence: Sequence) -> Generator[Event, None, None]:
        events = self._engine.loop.stream([sequence])
        try:
            yield from events
        finally:
            events.close()
            self.messages = [*asked, {"role": "assistant", "content": sequence.text.text.strip()}]
