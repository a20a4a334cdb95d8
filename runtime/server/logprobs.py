"""Log probabilities in the forms of OpenAI's two endpoints."""

from collections.abc import Sequence
from itertools import accumulate

from latentrt.runtime.engine.logprobs import TokenLogprobs
from latentrt.runtime.tokenizer import Tokenizer


def for_chat(tokenizer: Tokenizer, told: Sequence[TokenLogprobs]) -> dict:
    """Of an answer's tokens: text, bytes, and the likeliest others."""
    return {"content": [_token(tokenizer, t.token, t.logprob) | {"top_logprobs": _top(tokenizer, t)} for t in told]}


def _top(tokenizer: Tokenizer, told: TokenLogprobs) -> list[dict]:
    return [_token(tokenizer, token, logprob) for token, logprob in told.top]


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def for_completion(
    tokenizer: Tokenizer | None, tokens: Sequence[int], told: Sequence[TokenLogprobs | None], offset: int, as_ids: bool = False
) -> dict:
    """Of tokens and, where there is something to tell, their log probabilities; `offset`: characters of text before them.

    As OpenAI does, the token itself is among the likeliest ones. as_ids: tokens are named by their ids, as without a tokenizer.
    """
    texts = [_text(tokenizer, token) for token in tokens]
    tokenizer = None if as_ids else tokenizer
    return {
        "tokens": [_text(tokenizer, token) for token in tokens], "token_logprobs": [t and t.logprob for t in told],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else [],
        "top_logprobs": [t and _by_text(tokenizer, t) for t in told],
    }  # fmt: skip


def _by_text(tokenizer: Tokenizer | None, told: TokenLogprobs) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in (*told.top, (told.token, told.logprob)):
        found.setdefault(_text(tokenizer, token), logprob)  # of tokens with the same text the likeliest
    return found


def _text(tokenizer: Tokenizer | None, token: int) -> str:
    if tokenizer is None:
        return f"token_id:{token}"
    text = tokenizer.token_bytes(token).decode(errors="replace")
    return f"bytes:{tokenizer.token_bytes(token)!r}" if "\ufffd" in text else text
