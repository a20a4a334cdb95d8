"""Constrained answers, each checked by somebody else's reader: json, re, jsonschema."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import latentrt
from latentrt.runtime.engine.sampler import Sampler
from latentrt.runtime.errors import EngineError, RequestError
from latentrt.runtime.sampling_params import SamplingParams
from latentrt.runtime.structured import Constraint, Guides
from latentrt.runtime.tokenizer import Tokenizer
from tests.conftest import EXAMPLE

EOS, PADDING = 1, 40  # rows of logits beyond the tokenizer's
TOKENIZER = Tokenizer("example", EXAMPLE / "tokenizer.json", {"bos_token": "<｜begin▁of▁sentence｜>"}, {})
VOCAB = TOKENIZER.vocab_size + PADDING
GUIDES = Guides(TOKENIZER, VOCAB, frozenset({EOS, 7}))
SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0,
     "maximum": 150}}, "required": ["name", "age"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["a", "b", 3]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]{2}$"}]},
    {"type": "object", "properties": {"p": {"$ref": "#/$defs/point"}}, "required": ["p"], "additionalProperties": False,
     "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}},
                         "required": ["x"], "additionalProperties": False}}},
]  # fmt: skip
REGEXES = [r"[A-Z][a-z]{1,4} [0-9]{3}-[0-9]{4}", r"(yes|no){1,2}", r"é{1,3}\.", r"[^\n]{1,8}"]


def answer(constraint: Constraint, seed: int, most: int = 300) -> str:
    """What random logits give, which favour tokens at random, special ones and padding among them."""
    random, guide = np.random.default_rng(seed), GUIDES.guide(constraint)
    sampler, tokens = Sampler(SamplingParams(temperature=1.0, seed=seed), [], guide=guide), []
    while not guide.ended and len(tokens) < most:
        token = sampler.next(random.normal(size=VOCAB).astype(np.float32) * 3)
        assert not isinstance(token, EngineError), token
        assert token < TOKENIZER.vocab_size
        if token in (EOS, 7):
            break
        tokens.append(token)
    assert len(tokens) < most
    assert not set(tokens) & TOKENIZER.hidden_tokens.keys()
    return TOKENIZER.decode(tokens, skip_special=False)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(range(len(SCHEMAS))), st.integers(0, 9999))
def test_json_fits_its_schema(which, seed):
    schema = SCHEMAS[which]
    jsonschema.validate(json.loads(answer(Constraint("json_schema", schema), seed)), schema)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(REGEXES), st.integers(0, 9999))
def test_text_matches_its_expression(regex, seed):
    assert re.fullmatch(regex, answer(Constraint("regex", regex), seed))


@pytest.mark.parametrize("seed", range(5))
def test_choices_and_grammars(seed):
    choices = ('say "so"', "no", "<｜end▁of▁sentence｜>?", "été")
    assert answer(Constraint("choice", choices), seed) in choices
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3}){0,2}", answer(Constraint("grammar", LARK), seed))
    assert re.fullmatch(r"x[0-9]y(ab|c)", answer(Constraint("grammar", GBNF), seed))


LARK = 'start: NUMBER ("+" NUMBER){0,2}\nNUMBER: /[0-9]{1,3}/'
GBNF = 'root ::= "x" digit "y" ("ab" | "c")\ndigit ::= [0-9]'


@pytest.mark.parametrize(("constraint", "reason"), [
    (Constraint("json_schema", {"type": "strin"}), "strin"), (Constraint("json_schema", "{"), "not valid JSON"),
    (Constraint("json_schema", "5"), "accepted: an object"), (Constraint("json_schema", [1]), "accepted: an object"),
    (Constraint("regex", "(["), "unclosed"), (Constraint("grammar", "start: nothing"), "nothing"),
    (Constraint("grammar", "root ::= nothing"), "nothing"), (Constraint("choice", ()), "list of texts"),
])  # fmt: skip
def test_what_does_not_compile_is_refused_with_the_reason(constraint, reason):
    with pytest.raises(RequestError, match=reason):
        GUIDES.guide(constraint)


def test_an_end_token_is_allowed_only_where_the_answer_may_end():
    """Token 7 is "&", which strings may contain."""
    guide = GUIDES.guide(Constraint("json_schema", {"type": "string"}))
    for text, ends in (('"a', False), ('"', True)):
        for token in TOKENIZER.encode(text, special=False):
            guide.accept(token)
        assert np.isfinite(guide.mask(np.zeros(VOCAB, np.float32))[[EOS, 7]]).tolist() == [ends, ends]


def test_properties_come_in_the_order_of_each_schema():
    for names in ("ab", "ba"):  # the second must not get the first one's compiled grammar
        schema = {"type": "object", "properties": {n: {"const": 1} for n in names}, "required": ["a", "b"],
                  "additionalProperties": False}  # fmt: skip
        assert list(json.loads(answer(Constraint("json_schema", schema), 0))) == list(names)


def test_a_token_out_of_place_is_an_error():
    guide = GUIDES.guide(Constraint("choice", ("yes",)))
    with pytest.raises(EngineError, match="does not allow"):
        guide.accept(TOKENIZER.encode("no", special=False)[0])


def test_without_an_end_of_text_there_is_no_constraint():
    with pytest.raises(RequestError, match="end-of-text"):
        Guides(TOKENIZER, VOCAB, frozenset()).guide(Constraint("json_object"))


def test_what_the_first_constraint_needs_can_be_made_before(monkeypatch):
    guides, without = Guides(TOKENIZER, VOCAB, frozenset({EOS})), Guides(TOKENIZER, VOCAB, frozenset())
    guides.prepare()
    without.prepare()  # the first constraint is told why not
    monkeypatch.setattr(TOKENIZER, "to_json", None)
    assert not guides.guide(Constraint("choice", ("yes",))).ended
    with pytest.raises(RequestError, match="end-of-text"):
        without.guide(Constraint("json_object"))


def test_constraints_do_not_wait_for_one_that_compiles(monkeypatch):
    guides, begun, go_on = Guides(TOKENIZER, VOCAB, frozenset({EOS})), threading.Event(), threading.Event()
    compile_it = guides._compile

    def compiled(constraint):
        if constraint.kind == "regex":
            begun.set()
            assert go_on.wait(60)
        return compile_it(constraint)

    monkeypatch.setattr(guides, "_compile", compiled)
    with ThreadPoolExecutor(1) as other:
        slow = other.submit(guides.guide, Constraint("regex", "a+"))
        assert begun.wait(60)
        assert not guides.guide(Constraint("choice", ("yes",))).ended
        go_on.set()
        assert not slow.result().ended


def test_an_engines_answers_follow_it_and_end(example_bundle):
    """The example model, which knows no JSON: greedy, sampled, in a batch with free answers, with guesses on."""
    with latentrt.load(example_bundle, drafts=3) as engine:
        constraint = Constraint("json_schema", SCHEMAS[0])
        params = [SamplingParams(max_new_tokens=200, constraint=constraint), SamplingParams(max_new_tokens=20),
                  SamplingParams(max_new_tokens=200, temperature=1.0, seed=2, constraint=constraint)]  # fmt: skip
        bound, free, sampled = engine.generate(["The result:"] * 3, params)
        for result in (bound, sampled):
            jsonschema.validate(json.loads(result.text), SCHEMAS[0])
            assert result.finish_reason == "stop"
        assert free.text == engine.generate(["The result:"], params[1])[0].text
