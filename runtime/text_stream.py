"""Text of an answer while its tokens arrive: whole characters only, and nothing that may still become a stop string."""

import codecs
from collections.abc import Callable, Mapping, Sequence

_INCOMPLETE = "\ufffd"  # what an unfinished UTF-8 sequence decodes to
_FIRST_MARK, _MARKS = 0xD800, 0x400  # the high surrogates


class Detokenizer:
    """Incremental decoding. The pieces, joined, equal `decode` of all tokens, for byte-level tokenizers always.

    (Byte-fallback decoders take a whole run of bytes back if one of them is invalid: there it holds for valid UTF-8.)
    Only a window of tokens is decoded again: the last piece, as context, and what came after it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._context: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now; "" while a character is unfinished."""
        self._new.append(token)
        piece = self._piece()
        return "" if not piece or piece.endswith(_INCOMPLETE) else self._hand_out(piece)

    def finish(self) -> str:
        """The rest: unfinished bytes as U+FFFD."""
        return self._hand_out(self._piece()) if self._new else ""

    def _hand_out(self, piece: str) -> str:
        self._context, self._new = self._new, []
        return piece

    def _piece(self) -> str:
        known = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._new)[len(known) :]


class ByteDetokenizer:
    """The same for tokenizers whose text is that of their tokens' bytes, one after another, as byte-level ones' is."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that is certain now; "" while a character is unfinished."""
        found, decoder = self._bytes(token), self._decoder
        return found.decode() if found.isascii() and not decoder.buffer else decoder.decode(found)

    def finish(self) -> str:
        """The rest: unfinished bytes as U+FFFD."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


class StopStrings:
    """Cuts a text at the stop string that is complete first, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The text that is certain to stay, up to a stop string; then `found` is set."""
        if not self._stops:
            return piece
        self._held += piece
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            text, self._held = self._held[:at], ""
            return text
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def finish(self) -> str:
        """The text held back, when no more is to come."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class TextStream:
    """Detokenizer and stop strings of one answer.

    `hidden` are the tokens that `decode` leaves out, by id. One whose content is in a stop string is matched by its id, too:
    both there and in the text it is one mark, a lone surrogate, which no decoded text has; marks are not handed out.
    token_bytes: where the tokenizer is byte-level, what a token stands for.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str], hidden: Mapping[int, str] = {},
        token_bytes: Callable[[int], bytes] | None = None,
    ):  # fmt: skip
        wanted = [id for id, content in hidden.items() if any(content in stop for stop in stops)]
        self._marks = {id: chr(_FIRST_MARK + n) for n, id in enumerate(wanted[:_MARKS])}
        marked = list(stops)
        for id, mark in sorted(self._marks.items(), key=lambda item: -len(hidden[item[0]])):  # the longest content first
            marked = [stop.replace(hidden[id], mark) for stop in marked]
        self._given = dict(zip(marked, stops, strict=True))
        self._detokenizer = ByteDetokenizer(token_bytes) if token_bytes else Detokenizer(decode)
        self._stops = StopStrings([*dict.fromkeys([*stops, *marked])])
        self._unmarked = dict.fromkeys(map(ord, self._marks.values()))
        self._pieces: list[str] = []
        self.stopped = False  # whether a stop string was met

    @property
    def text(self) -> str:
        """What was handed out so far."""
        return "".join(self._pieces)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was met, as it was given."""
        return self._given.get(self._stops.found, self._stops.found)

    def add(self, token: int) -> str:
        """Text that a token makes certain."""
        if not self._given:  # no stop strings
            piece = self._detokenizer.add(token)
            self._pieces.append(piece)
            return piece
        mark = self._marks.get(token)
        return self._emit(self._stops.add(self._detokenizer.finish() + mark if mark else self._detokenizer.add(token)))

    def finish(self) -> str:
        """The last text, after the last token."""
        if self.stopped:
            return ""
        piece = self._stops.add(self._detokenizer.finish())
        return self._emit(piece + self._stops.finish())

    def _emit(self, piece: str) -> str:
        piece = piece.translate(self._unmarked)
        self._pieces.append(piece)
        self.stopped = self._stops.found is not None
        return piece
