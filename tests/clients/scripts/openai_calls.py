"""The openai package. `at` has the client's options: base_url, api_key, max_retries."""

import asyncio
import operator

import openai
import pydantic


def plain(thing):
    """An answer, page or stream as JSON has it."""
    if isinstance(thing, openai.Stream):
        return [chunk.model_dump(mode="json") for chunk in thing]
    return thing.model_dump(mode="json")


def call(at: dict, method: str, *args, **kwargs):
    """`client.METHOD(...)`; a stream as the list of its chunks."""
    with openai.OpenAI(**at) as client:
        return plain(operator.attrgetter(method)(client)(*args, **kwargs))


def header(at: dict, method: str, name: str, **kwargs) -> str | None:
    """One header of the answer."""
    with openai.OpenAI(**at) as client:
        resource, _, last = method.rpartition(".")
        raw = getattr(operator.attrgetter(resource)(client).with_raw_response, last)(**kwargs)
        return raw.headers.get(name)


def leave(at: dict, method: str, after: int, **kwargs) -> int:
    """Closes a stream in its midst, and tells how many chunks were read."""
    with openai.OpenAI(**at) as client:
        with operator.attrgetter(method)(client)(stream=True, **kwargs) as stream:
            return sum(1 for _, _ in zip(range(after), stream, strict=False))


def many(at: dict, method: str, asked: list[dict]) -> list[list[dict]]:
    """Streams of one async client, all at once."""

    async def one(client, kwargs: dict) -> list[dict]:
        stream = await operator.attrgetter(method)(client)(stream=True, **kwargs)
        return [chunk.model_dump(mode="json") async for chunk in stream]

    async def run() -> list[list[dict]]:
        async with openai.AsyncOpenAI(**at) as client:
            return await asyncio.gather(*(one(client, kwargs) for kwargs in asked))

    return asyncio.run(run())


def stream_helper(at: dict, **kwargs) -> dict:
    """client.chat.completions.stream: kinds of events, and what it put together."""
    with openai.OpenAI(**at) as client, client.chat.completions.stream(**kwargs) as stream:
        kinds = [event.type for event in stream]
        return {"kinds": kinds, "final": stream.get_final_completion().model_dump(mode="json")}


def responses_stream_helper(at: dict, **kwargs) -> dict:
    """client.responses.stream: kinds of events, and what it put together."""
    with openai.OpenAI(**at) as client, client.responses.stream(**kwargs) as stream:
        kinds = [event.type for event in stream]
        return {"kinds": kinds, "final": stream.get_final_response().model_dump(mode="json")}


def responses_parse(at: dict, fields: dict[str, str], **kwargs) -> dict:
    """client.responses.parse with a pydantic class of these fields, "int", "str" or "bool"."""
    types = {"int": int, "str": str, "bool": bool}
    form = pydantic.create_model("Form", **{name: (types[kind], ...) for name, kind in fields.items()})
    with openai.OpenAI(**at) as client:
        answer = client.responses.parse(text_format=form, **kwargs)
        return {"text": answer.output_text, "parsed": answer.output_parsed.model_dump()}


def parse(at: dict, fields: dict[str, str], **kwargs) -> dict:
    """client.chat.completions.parse with a pydantic class of these fields, "int", "str" or "bool"."""
    types = {"int": int, "str": str, "bool": bool}
    form = pydantic.create_model("Form", **{name: (types[kind], ...) for name, kind in fields.items()})
    with openai.OpenAI(**at) as client:
        answer = client.chat.completions.parse(response_format=form, **kwargs)
        return {"content": answer.choices[0].message.content, "parsed": answer.choices[0].message.parsed.model_dump()}


def parse_tool(at: dict, fields: dict[str, str], **kwargs) -> dict:
    """The same with openai.pydantic_function_tool, forced; the parsed arguments."""
    types = {"int": int, "str": str, "bool": bool}
    form = pydantic.create_model("Form", **{name: (types[kind], ...) for name, kind in fields.items()})
    with openai.OpenAI(**at) as client:
        answer = client.chat.completions.parse(
            tools=[openai.pydantic_function_tool(form, name="form")], tool_choice="required", **kwargs,
        )  # fmt: skip
        called = answer.choices[0].message.tool_calls[0].function
        return {"name": called.name, "arguments": called.arguments, "parsed": called.parsed_arguments.model_dump()}
