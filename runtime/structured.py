"""Answers that follow a JSON schema, a regular expression, a grammar or a list of choices: llguidance says what may come.

llguidance comes with `pip install "latentrt[server]"`, and is imported when the first such answer is asked for.
"""

import contextlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from latentrt.runtime.errors import EngineError, RequestError
from latentrt.runtime.tokenizer import Tokenizer

Kind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]
KEPT = 64  # compiled grammars
# One blank, or a line end and the next line's: small models would write line ends for ever.
BLANKS = {"whitespace_pattern": r" ?|\n {0,24}"}


@dataclass(frozen=True)
class Constraint:
    """What an answer must follow. value: a schema (a dict or JSON text), a regular expression, a grammar (Lark, or GBNF as
    llama.cpp has it), a tuple of texts; None for any JSON object."""

    kind: Kind
    value: Any = None

    @property
    def key(self) -> str:
        """A text that is the same for the same constraint. The order of properties counts: answers follow it."""
        return json.dumps([self.kind, self.value])


class Guides:
    """Compiles constraints for one tokenizer, and keeps the last ones. For several threads.

    vocab_size: logits in a row, which may be more than the tokenizer has tokens; eos_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]):
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def guide(self, constraint: Constraint) -> "Guide":
        """The state of a new answer. RequestError for a constraint that does not compile, with the reason."""
        key = constraint.key
        with self._lock:
            compiled = self._compiled.get(key)
        compiled = compiled or self._compile(constraint)  # others need not wait
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return Guide(compiled.deep_copy(), self._vocab_size, self._eos_ids)

    def prepare(self) -> None:
        """Does what the first constraint would wait for, and with it the whole process: llguidance holds Python's lock for it.

        Nothing where constraints cannot be had at all.
        """
        with contextlib.suppress(Exception):  # the first one is told; its parsers have classes of their own
            _ = self._known

    @cached_property
    def _known(self):
        """llguidance's view of the tokenizer: up to a second of work for 100,000 tokens."""
        llguidance = _llguidance()
        ends = sorted(self._eos_ids)
        if not ends:
            raise RequestError("an answer that follows a grammar needs an end-of-text token, and this bundle has none")
        return llguidance.LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=ends)

    def _compile(self, constraint: Constraint):
        llguidance = _llguidance()
        try:
            matcher = llguidance.LLMatcher(self._known, _grammar(llguidance, constraint), log_level=0)
        except RequestError:
            raise
        except Exception as error:  # of its parsers, each with a class of its own
            raise RequestError(f"the {constraint.kind} is not accepted: {error}") from None
        if matcher.is_error():
            raise RequestError(f"the {constraint.kind} is not accepted: {matcher.get_error()}")
        return matcher


class Guide:
    """The state of one answer."""

    def __init__(self, matcher, vocab_size: int, eos_ids: frozenset[int]):
        from llguidance.numpy import allocate_token_bitmask

        self._matcher, self._vocab_size, self._eos_ids = matcher, vocab_size, eos_ids
        self._bits = allocate_token_bitmask(1, vocab_size)

    @property
    def ended(self) -> bool:
        """Whether nothing but the end of the text can follow."""
        return self._matcher.is_stopped()

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits [vocab] with -inf for tokens that are not allowed. EngineError if the grammar is stuck."""
        return np.where(self._allowed(), logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Takes the next token of the answer. EngineError if the grammar does not allow it."""
        if token in self._eos_ids and (self.ended or self._matcher.is_accepting()):
            return
        if not self._matcher.consume_token(token):
            raise EngineError(f"the grammar does not allow token {token}: {self._matcher.get_error()}")

    def _allowed(self) -> np.ndarray:
        """[vocab] bool."""
        from llguidance.numpy import fill_next_token_bitmask

        if self.ended:
            allowed = np.zeros(self._vocab_size, bool)
            allowed[list(self._eos_ids)] = True
            return allowed
        fill_next_token_bitmask(self._matcher, self._bits)
        if self._matcher.is_error():
            raise EngineError(f"the grammar is stuck: {self._matcher.get_error()}")
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size].view(bool)
        if not self._matcher.is_accepting():  # an end token may have text that the grammar allows
            allowed[list(self._eos_ids)] = False
        return allowed


def _llguidance():
    try:
        import llguidance
    except ImportError:
        raise RequestError('answers that follow a grammar need llguidance; pip install "latentrt[server]"') from None
    return llguidance


def _grammar(llguidance, constraint: Constraint) -> str:
    """The constraint as llguidance takes it."""
    kind, value, matcher = constraint.kind, constraint.value, llguidance.LLMatcher
    if kind == "json_object":
        return matcher.grammar_from_json_schema(with_blanks({"type": "object"}, BLANKS))
    if kind == "json_schema":
        return matcher.grammar_from_json_schema(with_blanks(_schema(value), BLANKS))
    if kind == "regex":
        return matcher.grammar_from_regex(value)
    if kind == "choice":
        if not value or not all(isinstance(text, str) and text for text in value):
            raise RequestError(f"choice is {value!r}, accepted: a list of texts")
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in value))
    if "::=" in value:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        value = gbnf_to_lark(value)
    return matcher.grammar_from_lark(value)


def with_blanks(schema: dict | bool, blanks: dict) -> dict:
    """The schema with what llguidance takes from it about blanks, unless it says that itself."""
    return {"x-guidance": blanks} | (schema if isinstance(schema, dict) else {} if schema else {"not": {}})


def _schema(value: dict | str) -> dict | bool:
    try:
        schema = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema is not valid JSON ({error})") from None
    if not isinstance(schema, dict | bool):
        raise RequestError(f"the JSON schema is {json.dumps(schema)[:40]}, accepted: an object, true or false")
    return schema
