"""The corpus: the standard library's source, the language reference of `pydoc_data`, and chat about both."""

import ast
import hashlib
import random
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from examples.training.chat import PERSONA, chat_pairs, compiled_entries, conversations, render_chat, source_entries
from examples.training.config import SEED

SKIPPED_PARTS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}


@dataclass
class Corpus:
    """Documents in text form, without their begin and end tokens, and the held-out share of each kind."""

    code: list[str] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)
    chat: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    def train(self) -> list[str]:
        """All training documents in a fixed order."""
        return self.code + self.prose + self.chat


def stable_hash(text: str) -> int:
    """A number that depends on the text alone (Python's own hash changes from run to run)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def read_library() -> dict[str, str]:
    """Source of the standard library by relative path, without tests, tables and generated files."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS & set(relative.parts[:-1]) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8").strip() + "\n"
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        if len(text) > 200:
            sources[relative.as_posix()] = text
    return sources


def read_topics() -> dict[str, str]:
    """The sections of the language reference that ship as `pydoc_data/topics.py`."""
    source = (Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    assignment = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return {name: text.strip() + "\n" for name, text in ast.literal_eval(assignment.value).items()}


def top_level_pieces(source: str) -> list[str]:
    """Cut a file into its header and its top-level functions and classes, decorators included."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            starts.append(min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1)
    pieces = ["".join(lines[a:b]).strip() for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return [piece + "\n" for piece in pieces if len(piece) > 40]


def held_out_paths(sources: dict[str, str], size: int = 62_000) -> set[str]:
    """Whole files for the held-out text: 2 to 16 KB each, in the order of their hash, about `size` bytes in all."""
    chosen, total = set(), 0
    for path in sorted(sources, key=stable_hash):
        length = len(sources[path].encode())
        if 2_000 <= length <= 16_000 and total + length <= size and not path.endswith("__init__.py"):
            chosen.add(path)
            total += length
    return chosen


def build_corpus() -> Corpus:
    """Read, cut and split everything. Names of held-out files are held out of the chat pairs too."""
    sources, topics, rng, corpus = read_library(), read_topics(), random.Random(SEED), Corpus()
    held = held_out_paths(sources)
    pairs, held_pairs = [(q, a) for q, a in PERSONA.items() for _ in range(24)], []
    for path, source in sources.items():
        if path in held:
            corpus.held_out.append(source)
        else:
            corpus.code.extend(top_level_pieces(source) if stable_hash(path) % 2 else [source])
        for entry in source_entries(path, source):
            keep_out = path in held or stable_hash(entry[1]) % 64 == 0
            (held_pairs if keep_out else pairs).extend(chat_pairs(*entry))
    for entry in compiled_entries():
        pairs.extend(3 * chat_pairs(*entry))
    for name, text in topics.items():
        (corpus.held_out if stable_hash(name) % 40 == 7 and len(text) < 4000 else corpus.prose).append(text)
    corpus.chat = conversations(pairs, rng)
    corpus.held_out.extend(render_chat([pair]) for pair in rng.sample(held_pairs, min(100, len(held_pairs))))
    return corpus
