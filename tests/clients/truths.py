"""What servers must answer: the same asked of the engine itself."""

import numpy as np

from latentrt import SamplingParams
from latentrt.runtime.api import Engine
from latentrt.runtime.engine.sequence import GenerationResult

REASONS = {"stop": "stop", "length": "length", "context": "length"}
TOLERANCE = 2e-4  # of log probabilities in float32, whose batches differ


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def answer(engine: Engine, prompt: str | list, **params) -> GenerationResult:
    """To a text, to token ids, or to messages; greedy unless params say otherwise."""
    tokens = engine.chat_tokens(prompt) if isinstance(prompt, list) and isinstance(prompt[0], dict) else prompt
    return engine.generate([tokens], SamplingParams(**params))[0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[T, vocab_size] float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logprobs(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Row i has those of the token after the first i + 1: [T, vocab_size] float64."""
    return log_softmax(engine.logits([tokens]))


def text(engine: Engine, token: int) -> str:
    return engine.tokenizer.token_bytes(token).decode(errors="replace")
