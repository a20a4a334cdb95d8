"""Tool calls as the family writes them, while they come: DeepSeek-V2.5's and V3's form, and V3.1's.

V2.5: <calls begin> <call begin> function <sep> NAME, a line end, the arguments as a fenced block of JSON, <call end>; a line
end between calls; <calls end>. V3.1: <call begin> NAME <sep> ARGUMENTS <call end>.
"""

import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentrt.runtime.structured import Constraint, with_blanks
from latentrt.runtime.tokenizer import Tokenizer

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "\n```json\n"
_TOOLS = "\n\n## Tools\n\n### Function\n\nYou have the following functions available:\n\n"
COMPACT = {"whitespace_flexible": False}  # nobody reads arguments
_KIND = "function"
_LOOSE = " \t\r\n`"  # what may stand around arguments


@dataclass(frozen=True)
class ToolCallDelta:
    """What came of a call; its id and name only the first time."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass
class ToolCall:
    """A call: arguments are JSON text, cut short if the answer ended too early."""

    id: str
    name: str
    arguments: str = ""


def new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolCallParser:
    """Takes the text of an answer, special tokens included, in pieces; gives content and calls. Nothing is lost: what is no
    call is content."""

    def __init__(self, new_id: Callable[[], str] = new_id):
        self.calls: list[ToolCall] = []
        self._new_id, self._held, self._read = new_id, "", self._content
        self._marks = ""  # read, and content if no call follows
        self._part: tuple[str, list[ToolCallDelta]] = "", []

    def add(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Content and calls that are certain now."""
        self._held += text
        return self._taken()

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        """The rest: of a call without an end its arguments, of one without a beginning its text."""
        if self._read == self._arguments:
            rest = self._held if self.calls[-1].arguments else self._held.lstrip()
            self._give_arguments("" if re.fullmatch(r"\s*\n`{1,3}\s*", rest) else rest)
        else:
            self._give_content(self._marks + self._held)
        self._marks = ""
        self._held, self._read = "", self._content
        return self._taken()

    def _taken(self) -> tuple[str, list[ToolCallDelta]]:
        while self._held and self._read():
            pass
        part, self._part = self._part, ("", [])
        return part

    def _give_content(self, text: str) -> None:
        self._part = self._part[0] + text, self._part[1]

    def _give_arguments(self, text: str) -> None:
        if text:
            self.calls[-1].arguments += text
            self._part[1].append(ToolCallDelta(len(self.calls) - 1, None, None, text))

    # Each of these reads what it can from the held text; False if it needs more.

    def _content(self) -> bool:
        """Up to where calls begin."""
        found = [(place, mark) for mark in (CALLS_BEGIN, CALL_BEGIN) if (place := self._held.find(mark)) >= 0]
        if found:
            place, mark = min(found)
            self._give_content(self._held[:place])
            self._marks = mark if mark == CALLS_BEGIN else ""
            self._held = self._held[place + len(self._marks) :]
            self._read = self._between
            return True
        keep = max(_overlap(self._held, CALLS_BEGIN), _overlap(self._held, CALL_BEGIN))
        self._give_content(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _between(self) -> bool:
        """Another call, the end of all, or something else."""
        rest = self._held.lstrip()
        blanks = self._held[: len(self._held) - len(rest)]
        if rest.startswith(CALL_BEGIN):
            self._marks += blanks + CALL_BEGIN
            self._held, self._read = rest[len(CALL_BEGIN) :], self._head
        elif rest.startswith(CALLS_END):
            self._give_content(self._marks and self._marks + blanks + CALLS_END)
            self._held, self._read, self._marks = rest[len(CALLS_END) :], self._content, ""
        elif CALL_BEGIN.startswith(rest) or CALLS_END.startswith(rest):
            return False
        else:
            return self._no_call()
        return True

    def _head(self) -> bool:
        """Up to the arguments."""
        before, mark, after = self._held.partition(SEPARATOR)
        if not mark:
            return self._no_call() if any(m in before for m in (CALL_BEGIN, CALL_END, CALLS_END)) else False
        name, fenced = before.strip(), before.strip() == _KIND
        if fenced:
            name, line, block = after.partition("\n")
            opening, more, after = block.partition("\n")
            if not more and FENCE.startswith(f"\n{opening}") and CALL_END not in after + name:
                return False
            if not line or not more or opening.strip() != FENCE.strip():
                return self._no_call()
        if not name.strip() or "<｜" in name:
            return self._no_call()
        self.calls.append(ToolCall(self._new_id(), name.strip()))
        self._part[1].append(ToolCallDelta(len(self.calls) - 1, self.calls[-1].id, name.strip(), ""))
        self._held, self._read, self._marks = after, self._arguments, ""
        return True

    def _no_call(self) -> bool:
        self._give_content(self._marks)
        self._read, self._marks = self._content, ""
        return True

    def _arguments(self) -> bool:
        """Up to the end of the call."""
        if not self.calls[-1].arguments:
            self._held = self._held.lstrip()
        text, mark, after = self._held.partition(CALL_END)
        if mark:
            self._give_arguments(text.rstrip(_LOOSE))
            self._held, self._read = after, self._between
            return True
        certain = self._held[: len(self._held) - _overlap(self._held, CALL_END)].rstrip(_LOOSE)
        self._give_arguments(certain)
        self._held = self._held[len(certain) :]
        return False


def with_tools(messages: list[dict], tools: Sequence[dict]) -> list[dict]:
    """Messages whose system message tells of tools in the words that DeepSeek-V2.5 was trained on (its model card has them):
    its chat template renders calls, but no tools."""
    functions = [tool["function"] for tool in tools]
    listed = [f"- `{f['name']}`:\n```json\n{json.dumps(f, indent=4, ensure_ascii=False)}\n```\n" for f in functions]
    said = messages[0].get("content") if messages and messages[0].get("role") == "system" else None
    told = (said or "You are a helpful Assistant.") + _TOOLS + "\n".join(listed)
    return [{"role": "system", "content": told}, *messages[said is not None :]]


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def required_grammar(
    tokenizer: Tokenizer, tools: Sequence[dict], name: str | None, parallel: bool, fenced: bool = True
) -> Constraint:  # fmt: skip
    """An answer that is one call, of one tool, or where `parallel` one call or more, of `tools` (OpenAI's objects) or of the
    one named; arguments follow the function's schema. fenced: V2.5's form."""
    functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    begin, end, separator = (_terminal(tokenizer, mark) for mark in (CALL_BEGIN, CALL_END, SEPARATOR))
    more = r' ("\n" call)*' if parallel and name is None else ""
    rules = [f"start: {_terminal(tokenizer, CALLS_BEGIN)} call{more} {_terminal(tokenizer, CALLS_END)}",
             "call: " + " | ".join(f"call_{n}" for n in range(len(functions)))]  # fmt: skip
    for n, function in enumerate(functions):
        called = json.dumps(function["name"], ensure_ascii=False)
        head = f'"{_KIND}" {separator} {called} {json.dumps(FENCE)}' if fenced else f"{called} {separator}"
        rules.append(f"call_{n}: {begin} {head} arguments_{n}" + (r' "\n```"' if fenced else "") + f" {end}")
        schema = with_blanks(function.get("parameters") or {"type": "object"}, COMPACT)
        rules.append(f"arguments_{n}: %json {json.dumps(schema)}")
    return Constraint("grammar", "\n".join(rules))


def _terminal(tokenizer: Tokenizer, mark: str) -> str:
    """A mark in Lark: a token of its own where the tokenizer has one, else its text."""
    return mark if tokenizer.token_id(mark) is not None else json.dumps(mark, ensure_ascii=False)
