"""Questions and answers made from docstrings, and conversations made of those."""

import ast
import importlib
import inspect
import random
import re
from collections.abc import Iterator

from examples.training.config import EOS

# Modules whose functions are written in C: their docstrings are read by import, not from source.
COMPILED_MODULES = ("builtins", "math", "itertools", "time", "sys", "operator", "gc", "binascii", "zlib", "select")
PERSONA = {
    "Hello!": "Hello! Ask me what a function of Python's standard library does.",
    "Hi": "Hello! Ask me what a function of Python's standard library does.",
    "Who are you?": "I am a tiny DeepSeek-V2 model, trained on Python's standard library.",
    "What can you do?": "I can continue Python source, and I can say what a function of the standard library does.",
    "Thank you.": "You are welcome.",
}
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer questions about Python's standard library.")


def first_sentences(docstring: str | None, limit: int = 220) -> str | None:
    """The first sentence or two of a docstring's first paragraph on one line, or None if it says too little."""
    paragraph = (docstring or "").strip().split("\n\n")[0]
    text = " ".join(paragraph.split())
    if "->" in text or not re.match(r"[A-Z][a-z]", text) or len(text) < 20:
        return None
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    answer = sentences[0]
    if len(sentences) > 1 and len(answer) + len(sentences[1]) < limit:
        answer += " " + sentences[1]
    if len(answer) > limit or answer.endswith(("e.g.", "i.e.")):
        return None
    return answer if answer[-1] in ".!?" else answer.rstrip(":;,") + "."


def source_entries(path: str, source: str) -> Iterator[tuple[str, str, str | None, str]]:
    """Yield (kind, qualified name, docstring, parameters) of a module and its public functions and classes."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if any(part.startswith("_") for part in module.split(".")):
        return
    tree = ast.parse(source)
    yield "module", module, ast.get_docstring(tree), ""
    pending = [(module, node) for node in tree.body]
    while pending:
        parent, node = pending.pop(0)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{parent}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield "class", name, ast.get_docstring(node), ""
            pending.extend((name, child) for child in node.body)
        else:
            yield "function", name, ast.get_docstring(node), ast.unparse(node.args)


def compiled_entries() -> Iterator[tuple[str, str, str | None, str]]:
    """The same for modules written in C, and for the methods of the built-in types."""
    for module_name in COMPILED_MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else module_name + "."
        if prefix:
            yield "module", module_name, inspect.getdoc(module), ""
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not callable(value) or inspect.isfunction(value):
                continue
            kind = "class" if inspect.isclass(value) else "function"
            yield kind, prefix + name, inspect.getdoc(value), ""
            if kind == "class" and not issubclass(value, BaseException):
                methods = sorted(set(vars(value)) - {"mro"})
                yield from (
                    ("function", f"{prefix}{name}.{method}", inspect.getdoc(getattr(value, method)), "")
                    for method in methods
                    if not method.startswith("_") and callable(getattr(value, method))
                )


def chat_pairs(kind: str, name: str, docstring: str | None, parameters: str) -> list[tuple[str, str]]:
    """Questions and answers about one documented name; empty when its docstring does not say enough."""
    answer = first_sentences(docstring)
    if answer is None:
        return []
    if kind == "module":
        return [(f"What is the {name} module?", answer), (f"What is the {name} module for?", answer)]
    if kind == "class":
        return [(f"What is {name}?", answer), (f"Explain {name}.", answer)]
    pairs = [(f"What does {name} do?", answer)]
    parameters = re.sub(r"^(self|cls)(, )?", "", parameters)
    if parameters and len(parameters) < 60:
        pairs.append((f"How do I call {name}?", f"Call {name.rsplit('.', 1)[-1]}({parameters}). {answer}"))
    else:
        pairs.append((f"Explain {name}.", answer))
    return pairs


def render_chat(pairs: list[tuple[str, str]], system: str | None = None) -> str:
    """The text of a conversation as the chat template writes it, without the first begin and the last end token."""
    turns = [f"User: {question}\n\nAssistant: {answer}" for question, answer in pairs]
    return (f"{system}\n\n" if system else "") + EOS.join(turns)


def conversations(pairs: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """Shuffle pairs into conversations: most of one turn, some of two, some with a system message."""
    pairs = rng.sample(pairs, len(pairs))
    texts = []
    while pairs:
        turns = [pairs.pop() for _ in range(min(len(pairs), 2 if rng.random() < 0.12 else 1))]
        texts.append(render_chat(turns, rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.08 else None))
    return texts
