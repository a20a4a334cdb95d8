"""Streaming text: whole characters, held-back stop strings, and in the end the text of the full decode."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from latentrt.runtime.text_stream import ByteDetokenizer, Detokenizer, StopStrings, TextStream
from latentrt.runtime.tokenizer import Tokenizer as LatentrtTokenizer
from tests.conftest import EXAMPLE

LATENTRT_TOKENIZER = LatentrtTokenizer("example", EXAMPLE / "tokenizer.json", {}, {})
EXAMPLE_TOKENIZER = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))


def byte_fallback_tokenizer() -> Tokenizer:
    """A tokenizer in the style of Llama: words with a leading mark, single bytes, the first blank stripped."""
    words = ["<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁a", "▁", "b", "é", "▁hello", "�"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, EXAMPLE_TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_pieces_join_to_the_full_decode(ids):
    check_pieces(EXAMPLE_TOKENIZER, ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, EXAMPLE_TOKENIZER.get_vocab_size() + 3), max_size=40), st.booleans())
def test_bytes_of_tokens_join_to_the_full_decode(ids, skip_special):
    """Special tokens, bytes that are no UTF-8, and ids that no token has among them."""
    known = LATENTRT_TOKENIZER.text_bytes(skip_special)
    detokenizer = ByteDetokenizer(known)
    pieces = [detokenizer.add(i) for i in ids] + [detokenizer.finish()]
    assert "".join(pieces) == EXAMPLE_TOKENIZER.decode(ids, skip_special_tokens=skip_special)


@settings(max_examples=100, deadline=None)
@given(st.text("a é\0\u20ac🙂\ufffd", max_size=20))
def test_pieces_join_where_blanks_are_stripped_and_bytes_fall_back(text):
    tokenizer = byte_fallback_tokenizer()
    ids = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in text.encode()]
    check_pieces(tokenizer, [tokenizer.token_to_id("▁hello"), tokenizer.token_to_id("<s>"), tokenizer.token_to_id("▁a"), *ids])


def check_pieces(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.add(i) for i in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_a_character_is_never_cut(text):
    detokenizer = Detokenizer(EXAMPLE_TOKENIZER.decode)
    emitted = ""
    for token in EXAMPLE_TOKENIZER.encode(text, add_special_tokens=False).ids:
        emitted += detokenizer.add(token)
        assert text.startswith(emitted)
    assert emitted + detokenizer.finish() == text


def test_an_emoji_comes_in_one_piece():
    ids = EXAMPLE_TOKENIZER.encode("🙂", add_special_tokens=False).ids
    assert len(ids) > 1
    detokenizer = Detokenizer(EXAMPLE_TOKENIZER.decode)
    assert [detokenizer.add(i) for i in ids] == [""] * (len(ids) - 1) + ["🙂"]
    detokenizer.add(ids[0])
    assert detokenizer.finish() == "\ufffd"


def cut(text: str, stops: list[str]) -> str:
    """The naive twin: character by character, the first stop string that is complete ends the text."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=400, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 4)))
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, lengths):
    matcher, rest, emitted = StopStrings(stops), text, ""
    for length in [*lengths, *[1] * len(text)]:
        piece, rest = rest[:length], rest[length:]
        if matcher.found is None:
            emitted += matcher.add(piece)
            assert cut(text, stops).startswith(emitted)  # nothing that is cut later was handed out
    emitted += matcher.finish() if matcher.found is None else ""
    assert emitted == cut(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopStrings(["\n\nUser:"])
    assert [matcher.add(p) for p in ("one\n", "\nUs", "ual", "\n\nUser", ": x")] == ["one", "", "\n\nUsual", "", ""]
    assert matcher.found == "\n\nUser:"


@pytest.mark.parametrize(("stops", "text", "stopped"), [((" sta",), "We", True), (("xyz",), "We start\ufffd", False)])
def test_stop_strings_across_tokens(stops, text, stopped):
    ids = EXAMPLE_TOKENIZER.encode("We start", add_special_tokens=False).ids
    ids.append(EXAMPLE_TOKENIZER.encode("🙂", add_special_tokens=False).ids[0])
    stream = TextStream(EXAMPLE_TOKENIZER.decode, stops)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert (stream.text, "".join(pieces), stream.stopped) == (text, text, stopped)


HIDDEN = {0: "<bos>", 1: "<eos>", 2: "<|im_end|>", 3: "<|im"}  # token 3's content begins like token 2's


def streamed(tokens: list[int | str], stops: list[str]) -> tuple[str, bool, int]:
    """Text, whether it stopped, and after how many tokens. Tokens are letters and hidden ids."""
    letters = {ord(c): c for t in tokens if isinstance(t, str) for c in t}
    ids = [i for t in tokens for i in ([t] if isinstance(t, int) else map(ord, t))]
    stream = TextStream(lambda seen: "".join(letters.get(i, "") for i in seen), stops, HIDDEN)
    seen = 0
    while seen < len(ids) and not stream.stopped:
        stream.add(ids[seen])
        seen += 1
    stream.finish()
    return stream.text, stream.stopped, seen


@pytest.mark.parametrize(
    ("tokens", "stops", "expected"),
    [
        (["abc", 2, "de"], ["<|im_end|>"], ("abc", True, 4)),
        (["abc", 1, "de"], ["<|im_end|>"], ("abcde", False, 6)),
        (["abc", 2, "de"], ["c<|im_end|>d"], ("ab", True, 5)),  # around a special token
        (["abc", 2, "de"], ["c<|im_end|>x"], ("abcde", False, 6)),
        (["abcde", 2], ["cd<|im_end|>", "bc"], ("a", True, 3)),
        (["ab", 0, 1, "c"], ["<bos><eos>"], ("ab", True, 4)),
        (["ab", 0, "c", 1], ["<bos><eos>"], ("abc", False, 5)),
        (["ab", 3, "c", 2], ["<|im"], ("ab", True, 3)),
        (["ab", 2, "c"], ["<|im"], ("abc", False, 4)),  # no part of a token's content
        (["ab", 3, 2], ["<|im_end|>"], ("ab", True, 4)),
        (["x<eos>y"], ["<eos>"], ("x", True, 6)),  # spelled out in letters
        (["xEOSy"], ["EOS"], ("x", True, 4)),
    ],
)
def test_stop_strings_with_special_tokens_are_met_by_id(tokens, stops, expected):
    assert streamed(tokens, stops) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", 0, 1]), max_size=12),
    st.lists(st.text("ab\x00\x01", min_size=1, max_size=3), max_size=2),
)
def test_special_tokens_in_stop_strings_are_like_letters(tokens, patterns):
    """The naive twin sees a special token of any stop string as one letter, and takes it out of the text in the end."""
    spelled = [p.replace("\x00", HIDDEN[0]).replace("\x01", HIDDEN[1]) for p in patterns]
    letters = [chr(t) if isinstance(t, int) else t for t in tokens]
    text = "".join(t for t in letters if t.isalpha() or t in "".join(patterns))
    expected = cut(text, patterns).replace("\x00", "").replace("\x01", "")
    assert streamed(tokens, spelled)[0] == expected
