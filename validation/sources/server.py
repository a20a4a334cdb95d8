"""An OpenAI-compatible server: log probabilities of prompts that are token ids.

latentrt's and vLLM's echo the prompt with the likeliest tokens of every place, named by id (`return_tokens_as_token_ids`,
vLLM's word). TensorRT-LLM's knows no such word and forbids what it does not know, but gives the logits of the prompt
(`return_context_logits`; tensorrt_llm/serve/openai_protocol.py), if its engine gathers them.
"""

import json
import os
from collections.abc import Iterator
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np

from latentrt.validation.errors import ValidationError
from latentrt.validation.sources import SourceOptions
from latentrt.validation.sources.base import Rows, Source

LOGPROBS = 20  # the most that vLLM and latentrt tell by default
KEY = "OPENAI_API_KEY"  # in the environment: what a server that asks for one is told
TENSORRT_LLM = "tensorrt_llm"
_ID = "token_id:"
_PATIENCE = 600  # seconds for an answer


class ServerSource(Source):
    """One request a window. Raises ValidationError where it cannot be reached, refuses, or leaves out what is needed."""

    kind = "server"

    def __init__(self, location: str, options: SourceOptions):
        url = location.rstrip("/")
        super().__init__(url)
        self.base = url if url.endswith("/v1") else f"{url}/v1"
        card = self._model(self._call("models"))
        self.model, self.owner = card["id"], card.get("owned_by")
        if isinstance(length := card.get("max_model_len"), int):
            self.longest = min(self.longest, length - 1)  # an answer has one token more

    def rows(self, windows: list[np.ndarray]) -> Iterator[Rows]:
        read = self._logits if self.owner == TENSORRT_LLM else self._echo
        return (read(window) for window in windows)

    def describe(self) -> dict:
        return {"kind": self.kind, "name": self.name, "executed": f"model {self.model} of {self.owner or 'a server'}"}

    def _model(self, listed: dict) -> dict:
        cards = listed.get("data") if isinstance(listed, dict) else None
        if not cards or not isinstance(cards[0], dict) or "id" not in cards[0]:
            raise ValidationError(f"{self.base}/models: names no model; give the URL of a server with OpenAI's API")
        return cards[0]

    def _ask(self, window: np.ndarray, **fields) -> dict:
        body = {"model": self.model, "prompt": window.tolist(), "max_tokens": 1, "temperature": 0}
        return self._call("completions", body | fields)["choices"][0]

    def _echo(self, window: np.ndarray) -> Rows:
        told = self._ask(window, echo=True, logprobs=LOGPROBS, return_tokens_as_token_ids=True).get("logprobs") or {}
        following, top = told.get("token_logprobs") or [], told.get("top_logprobs") or []
        if len(following) != len(window) + 1 or len(top) != len(window) + 1:
            raise ValidationError(
                f"{self.name}: gave log probabilities of {len(following)} tokens for a prompt of {len(window)} and one more; "
                "echo with logprobs is needed, as latentrt's and vLLM's servers have it"
            )
        return self._rows(window, [value for value in following[1:-1]], top[1:])

    def _rows(self, window: np.ndarray, following: list[float], top: list[dict]) -> Rows:
        ids = np.full((len(window), LOGPROBS + 1), -1)
        logprobs = np.full(ids.shape, -np.inf)
        for row, likely in enumerate(top):
            for place, (token, value) in enumerate(sorted(likely.items(), key=lambda pair: -pair[1])[: LOGPROBS + 1]):
                if not token.startswith(_ID):
                    raise ValidationError(
                        f"{self.name}: names tokens by their texts ({token!r}), of which several may be the same; "
                        "return_tokens_as_token_ids is needed, as latentrt's and vLLM's servers have it"
                    )
                ids[row, place], logprobs[row, place] = int(token.removeprefix(_ID)), value
        return Rows(logprobs, np.array(following, np.float64), ids)

    def _logits(self, window: np.ndarray) -> Rows:
        logits = self._ask(window, return_context_logits=True).get("context_logits")
        if not logits or len(logits) != len(window):
            raise ValidationError(f"{self.name}: gave no logits of the prompt; TensorRT-LLM needs gather_context_logits")
        return Rows.of_logits(window, np.array(logits, np.float32))

    def _call(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        key = os.environ.get(KEY)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = Request(f"{self.base}/{path}", data, headers)
        try:
            with urlopen(request, timeout=_PATIENCE) as answer:
                return json.load(answer)
        except HTTPError as error:
            said = error.read(500).decode(errors="replace").replace("\n", " ")
            raise ValidationError(f"{self.base}/{path}: refused with status {error.code}: {said}") from None
        except (URLError, OSError) as error:
            raise ValidationError(f"{self.base}/{path}: cannot be reached ({getattr(error, 'reason', error)})") from None
        except ValueError:
            raise ValidationError(f"{self.base}/{path}: did not answer with JSON; is it a server with OpenAI's API?") from None
