"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them; and the policy of the page."""

import asyncio

from latentrt.runtime.api import Engine
from latentrt.runtime.errors import RequestError
from latentrt.runtime.server.chat import plain_message
from latentrt.runtime.server.protocol import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


async def tokenize(engine: Engine, body: TokenizeRequest) -> TokenizeResponse:
    """Raises RequestError, BundleError."""
    tokens = await asyncio.to_thread(_tokens, engine, body)
    texts = [engine.tokenizer.decode([t], skip_special=False) for t in tokens] if body.return_token_strs else None
    return TokenizeResponse(count=len(tokens), max_model_len=engine.limits.max_context, tokens=tokens, token_strs=texts)


def _tokens(engine: Engine, body: TokenizeRequest) -> list[int]:
    tokenizer = engine.needed_tokenizer()
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give prompt or messages, one of them")
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, special=body.add_special_tokens is not False)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools else None
    begins = body.add_generation_prompt is not False
    return tokenizer.encode_chat([plain_message(m) for m in body.messages], tools, add_generation_prompt=begins)


def detokenize(engine: Engine, body: DetokenizeRequest) -> DetokenizeResponse:
    """Raises BundleError."""
    return DetokenizeResponse(prompt=engine.needed_tokenizer().decode(body.tokens, skip_special=False))


def info(engine: Engine) -> dict:
    """What clients need to know of the tokenizer. Raises BundleError."""
    tokenizer = engine.needed_tokenizer()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "vocab_size": tokenizer.vocab_size,
        "model_max_length": engine.limits.max_context, "chat_template": tokenizer.template_source(),
        **{role: content for role, content in tokenizer.special_tokens.items() if isinstance(content, str)},
    }  # fmt: skip
