"""/v1/responses: OpenAI's newer form of chats, made of them. Nothing is kept: each request brings its whole conversation."""

import uuid
from collections.abc import AsyncIterator, Iterator

from pydantic import BaseModel, ValidationError

from latentrt.runtime.errors import EngineError, RequestError
from latentrt.runtime.server import logprobs
from latentrt.runtime.server.chat import Chat
from latentrt.runtime.server.protocol import ChatRequest, SamplingBody
from latentrt.runtime.server.responses_protocol import (
    FunctionCallItem,
    FunctionCallOutput,
    InputMessage,
    NamedFunctionTool,
    ResponsesRequest,
)  # fmt: skip
from latentrt.runtime.server.streaming import sse
from latentrt.runtime.server.tool_calls import ToolCallDelta
from latentrt.runtime.service import EngineService

LOGPROBS = "message.output_text.logprobs"  # of `include`
_ITEMS = {"message": InputMessage, "function_call": FunctionCallItem, "function_call_output": FunctionCallOutput}
_NOT_KEPT = {
    "previous_response_id": "earlier responses are not kept; give the whole conversation as input",
    "conversation": "conversations are not kept; give the whole one as input",
    "prompt": "prompts are not kept; give instructions and input",
    "background": "answers are not kept for later; leave background out",
}
_OWN = {"messages", "logprobs", "top_logprobs", "max_tokens", "tools", "tool_choice", "response_format", "parallel_tool_calls"}


class Responses:
    """One request; see `of`."""

    def __init__(self, chat: Chat, model: str, body: ResponsesRequest):
        self._chat, self._model, self._body = chat, model, body
        self.answers = chat.answers
        self._id, self._output, self._number = f"resp_{uuid.uuid4().hex}", _Output(), 0

    @classmethod
    async def of(cls, service: EngineService, model: str, body: ResponsesRequest) -> "Responses":
        """A request whose answer is on its way. Raises RequestError and what EngineService.submit raises."""
        return cls(await Chat.of(service, model, chat_request(body)), model, body)

    async def respond(self) -> dict:
        """The whole answer."""
        async for _ in self._events():
            pass
        return self._response()

    async def stream(self) -> AsyncIterator[bytes]:
        """Events: the response begins, its items come, it ends; the last one has all of it."""
        for kind in ("created", "in_progress"):
            yield self._sse({"type": f"response.{kind}", "response": self._response()})
        try:
            async for event in self._events():
                yield self._sse(event)
        except EngineError as error:
            yield self._sse({"type": "response.failed", "response": self._response(error)})
            return
        response = self._response()
        yield self._sse({"type": f"response.{response['status']}", "response": response})

    async def _events(self) -> AsyncIterator[dict]:
        async for event, answer in self.answers.events():
            told = logprobs.for_chat(self._chat.tokenizer, [event.logprobs])["content"] if event.logprobs else []
            content, calls = self._chat.parse(0, event.text, answer.result is not None)
            for delta in self._output.add(content, told, calls):
                yield delta
            if answer.result:
                for done in self._output.finish("incomplete" if answer.finish_reason == "length" else "completed"):
                    yield done

    def _sse(self, event: dict) -> bytes:
        numbered = event | {"sequence_number": self._number}
        self._number += 1
        return f"event: {event['type']}\n".encode() + sse(numbered)

    def _response(self, error: EngineError | None = None) -> dict:
        body, reason = self._body, self.answers.answers[0].finish_reason
        status = "failed" if error else {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
        choice, text = body.tool_choice or "auto", body.text.model_dump(by_alias=True, exclude_unset=True) if body.text else {}
        return {
            "id": self._id, "object": "response", "created_at": self.answers.created, "status": status, "model": self._model,
            "output": self._output.items, "usage": self._usage() if reason else None,
            "error": {"code": "server_error", "message": str(error)} if error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None, "store": False,
            "temperature": body.temperature, "text": text or {"format": {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or []], "top_logprobs": body.top_logprobs, "top_p": body.top_p,
            "truncation": "disabled",
        }  # fmt: skip

    def _usage(self) -> dict:
        usage = self.answers.usage()
        return {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }  # fmt: skip


class _Output:
    """The items of a response as they grow, and the events that tell of it, to be sent before the next one is asked for. The
    last item is open until `finish`, or until another one begins."""

    def __init__(self):
        self.items: list[dict] = []
        self._call: int | None = None  # the index of the call that is open

    def add(self, content: str, told: list[dict], calls: list[ToolCallDelta]) -> Iterator[dict]:
        """More text, and more of calls."""
        if content or told:
            yield from self._add_text(content, told)
        for call in calls:
            yield from self._add_call(call)

    def finish(self, status: str) -> Iterator[dict]:
        """No more comes: how the last item ends."""
        if not self.items:
            yield from self._open_message()
        yield from self._close(status)

    def _add_text(self, text: str, told: list[dict]) -> Iterator[dict]:
        if not self._is_open("message"):
            yield from self._open_message()
        (part,) = self.items[-1]["content"]
        part["text"] += text
        part["logprobs"] += told
        yield self._of_part({"type": "response.output_text.delta", "delta": text, "logprobs": told})

    def _add_call(self, call: ToolCallDelta) -> Iterator[dict]:
        if not self._is_open("function_call") or self._call != call.index:
            item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call.id, "name": call.name,
                    "arguments": "", "status": "in_progress"}  # fmt: skip
            yield from self._open(item)
            self._call = call.index
        self.items[-1]["arguments"] += call.arguments
        if call.arguments:
            yield self._of_item({"type": "response.function_call_arguments.delta", "delta": call.arguments})

    def _is_open(self, kind: str) -> bool:
        return bool(self.items) and self.items[-1]["type"] == kind and self.items[-1]["status"] == "in_progress"

    def _open_message(self) -> Iterator[dict]:
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": "in_progress", "content": []}
        yield from self._open(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._of_part({"type": "response.content_part.added", "part": part})
        item["content"].append(part)

    def _open(self, item: dict) -> Iterator[dict]:
        if self.items:
            yield from self._close("completed")
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}

    def _close(self, status: str) -> Iterator[dict]:
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._of_part({"type": "response.output_text.done"} | done)
            yield self._of_part({"type": "response.content_part.done", "part": part})
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._of_item({"type": "response.function_call_arguments.done"} | done)
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _of_item(self, event: dict) -> dict:
        return event | {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _of_part(self, event: dict) -> dict:
        return self._of_item(event) | {"content_index": 0}


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The chat that asks for the same. Raises RequestError for what cannot be done."""
    for name, words in _NOT_KEPT.items():
        if getattr(body, name):
            raise RequestError(f"{name}: {words}")
    if body.truncation == "auto":
        raise RequestError("truncation is 'auto', accepted: disabled; a conversation is not cut here, shorten it")
    if (body.n or 1) != 1 or body.max_tokens is not None:
        raise RequestError("n and max_tokens are fields of chats; responses have one answer and max_output_tokens")
    shared = {name: getattr(body, name) for name in SamplingBody.model_fields if name in body.model_fields_set - _OWN}
    choice = body.tool_choice if body.tools or body.tool_choice != "auto" else None
    return ChatRequest(
        **shared, messages=list(_messages(body)), max_completion_tokens=body.max_output_tokens,
        tools=[{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools or []] or None,
        tool_choice={"function": {"name": choice.name}} if isinstance(choice, NamedFunctionTool) else choice,
        parallel_tool_calls=body.parallel_tool_calls, response_format=_response_format(body),
        logprobs=body.top_logprobs is not None or LOGPROBS in (body.include or ()), top_logprobs=body.top_logprobs,
    )  # fmt: skip


def _response_format(body: ResponsesRequest) -> dict | None:
    if body.text is None or "format" not in body.text.model_fields_set:
        return body.response_format and body.response_format.model_dump(by_alias=True)
    given = body.text.format
    schema = given.model_dump(by_alias=True, exclude={"type"}) if given.type == "json_schema" else None
    return {"type": given.type, "json_schema": schema}


def _messages(body: ResponsesRequest) -> Iterator[dict]:
    if body.instructions:
        yield {"role": "system", "content": body.instructions}
    if isinstance(body.input, str):
        yield {"role": "user", "content": body.input}
        return
    if not body.input:
        raise RequestError("input is empty; give a text or one item or more")
    calls: list[dict] = []  # of one turn, which go into one message
    for item in (_item(n, given) for n, given in enumerate(body.input)):
        if isinstance(item, FunctionCallItem):
            call = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": call})
            continue
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}
            calls = []
        if isinstance(item, FunctionCallOutput):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
        else:
            yield {"role": "system" if item.role == "developer" else item.role, "content": item.content}
    if calls:
        yield {"role": "assistant", "content": None, "tool_calls": calls}


def _item(n: int, given: dict) -> BaseModel:
    kind = given.get("type", "message")
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise RequestError(f"input[{n}] is of type {kind!r}, accepted: {', '.join(_ITEMS)}")
    try:
        return _ITEMS[kind].model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][:1])
        raise RequestError(f"input[{n}].{place}: {first['msg']}") from None
