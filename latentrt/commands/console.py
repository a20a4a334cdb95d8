"""What the commands show to people, and the interactive chat."""

import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

from latentrt.runtime.bundle.manifest import EndToken, Target, Text, WeightFormat, WeightSet
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.chat import Conversation
from latentrt.runtime.engine.sequence import Event, GenerationResult
from latentrt.runtime.errors import BundleError, RequestError

_NAMED = 8  # modules of a recipe that are shown


def info_table(bundle: Bundle) -> Table:
    """What a bundle is: its model, and one block per target."""
    manifest = bundle.manifest
    config = manifest.config
    table = Table("", "", title=Line(str(bundle.path)), show_header=False, title_justify="left")
    table.columns[1].overflow = "fold"
    rows = {
        "model": f"{manifest.family}, {config.get('num_hidden_layers')} layers, vocabulary {config.get('vocab_size')}",
        "checkpoint": f"{manifest.checkpoint.path} ({manifest.checkpoint.storage})\n{manifest.checkpoint.digest}",
        "made": f"{manifest.created} by {manifest.producer}",
        **_text_rows(manifest.text),
        "size": _bytes(sum(ref.size for ref in set(manifest.refs()))),
    }
    _add(table, rows)
    for name, target in manifest.targets.items():
        _add(table, _target_rows(bundle, name, target))
    return table


def _text_rows(text: Text) -> dict[str, str]:
    """Tokenizer, templates, what ends an answer and who says so, and how answers are sampled if nobody says."""
    known = text.tokenizer is not None
    sampling = {"temperature": 0} | text.sampling
    said = ", ".join(f"{name} {value}{' (greedy)' * (name == 'temperature' and not value)}" for name, value in sampling.items())
    rows = {
        "tokenizer": f"{text.source}, {text.vocab_size} tokens" if known else "none: token ids only",
        "chat templates": ", ".join(text.templates) or "none: plain prompts only",
        "end of text": "\n".join(map(_end_token, text.end_of_text)) or "none: answers end at their longest length",
        "sampling": said,
    }
    return rows | ({"not applied": ", ".join(text.ignored)} if text.ignored else {})


def _end_token(end: EndToken) -> str:
    return f"{end.id}{f' {end.token!r}' if end.token is not None else ''} ({', '.join(end.sources)})"


def _machine(target: Target) -> str:
    return target.compute_capability or ("CPU or CUDA GPU" if target.backend == "torch" else "any CPU")


def _rank_rows(target: Target, weights: WeightSet) -> dict[str, str]:
    """What each of several ranks holds."""
    if target.ranks == 1:
        return {}
    files = sum(ref.size for ref in weights.files)
    experts = sum(weights.tensors[name].size for name in target.shared_weights)
    own = files - experts + experts // target.ranks
    return {"ranks": f"{target.ranks}, each with {_bytes(own)} of weights ({_bytes(experts // target.ranks)} of experts)"}


def _target_rows(bundle: Bundle, name: str, target: Target) -> dict[str, str]:
    cache, limits = target.cache, target.limits
    options = ", ".join(f"{key} {value}" for key, value in target.options.items())
    weights = bundle.manifest.weight_sets[target.weight_set]
    per_token, per_context = _bytes(cache.bytes_per_token), _bytes(cache.bytes_per_token * limits.max_context)
    evidence = "\n".join(map(str, bundle.evidence_files(name)))
    return {
        f"target {name}": f"{target.backend} {target.backend_version}, {_machine(target)}",
        "precision": f"{target.precision}{f' ({options})' if options else ''}",
        "weights": f"{weights.format.name}, {_bytes(sum(ref.size for ref in weights.files))} in {len(weights.files)} files",
        **_plain_rows(weights.format),
        **_rank_rows(target, weights),
        "engines": ", ".join(f"{form} ({_bytes(engine.graph.size)})" for form, engine in target.engines.items()),
        "latent cache": f"{cache.format}, pages of {cache.page_size}: {per_token} per token, {per_context} per context",
        "limits": f"context {limits.max_context}, {limits.max_batch_tokens} rows and {limits.max_sequences} sequences a step",
        "executed": f"{target.executed.date} on {target.executed.machine}" if target.executed else "never",
        "evidence": evidence or "none: run latentrt validate",
    }


def _plain_rows(weight_format: WeightFormat) -> dict[str, str]:
    """What a recipe left unquantized; in bundles without one, nothing."""
    modules = weight_format.plain_modules
    more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
    return {f"kept {weight_format.plain}": "\n".join(modules[:_NAMED]) + more} if modules else {}


def _add(table: Table, rows: dict[str, str]) -> None:
    for key, value in rows.items():
        table.add_row(Line(key), Line(value))
    table.add_section()


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def summary(result: GenerationResult) -> str:
    """One line about an answer."""
    timings = result.timings
    rate = f", {timings.decode_tokens_per_second:.1f} tokens/s" if timings.decode_tokens_per_second else ""
    reused = f" ({result.reused_tokens} of them cached)" if result.reused_tokens else ""
    prefill = f"{result.prompt_tokens} prompt tokens{reused} in {timings.prefill_seconds:.3f} s"
    return f"[{prefill}, {len(result.token_ids)} new{rate}, end: {result.finish_reason}]"


def note(text: str, style: str = "dim") -> None:
    """A line on stderr, beside the text that is the output."""
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """Text to stdout, as it comes. What the terminal cannot show is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def chat_loop(conversation: Conversation) -> bool:
    """Reads messages, one a line, until /exit or the end of stdin; /reset begins anew. Returns whether all were answered."""
    answered = True
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            note("[the history is forgotten]")
        elif line:
            answered = _turn(conversation, line) and answered
    return answered


def _turn(conversation: Conversation, text: str) -> bool:
    try:
        events = conversation.say(text)
    except RequestError as error:
        note(f"error: {error}", "red")
        return False
    result = _show(events)
    write("\n")
    note(summary(result) if result else "[stopped]")
    return True


def _show(events: Generator[Event, None, None]) -> GenerationResult | None:
    """Writes an answer as it comes; None if it was stopped."""
    begun, result = False, None
    with _interruptible() as interrupted:
        try:
            for event in events:
                piece = event.text if begun else event.text.lstrip()
                begun, result = begun or bool(piece), event.result
                write(piece)
                if interrupted:
                    break
        except KeyboardInterrupt:
            pass
        finally:
            events.close()
    return result


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        for line in sys.stdin:
            write(f"> {line.rstrip()}\n")
            yield line.strip()
        return
    import readline  # noqa: F401  (line editing and history for input())

    note("One message a line. /reset forgets the history, /exit or Ctrl-D leaves, Ctrl-C stops an answer.")
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            note("\n[/exit leaves]")
        except EOFError:
            note("")
            return


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first Ctrl-C puts an entry into the list and lets the step end; the second one interrupts the step."""
    signals: list[int] = []

    def handle(number, frame) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def verify(bundle: Bundle, quiet: bool) -> list[str]:
    """Compares every digest, with a progress bar on stderr; returns what is wrong."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=quiet or not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("digests", total=sum(ref.size for ref in set(bundle.manifest.refs())))
        return bundle.verify(lambda size: progress.advance(task, size))


def check_files(bundle: Bundle) -> None:
    """Looks at the size of every file. Raises BundleError for the first that is missing or truncated."""
    if not bundle.manifest.targets:
        raise BundleError(f"{bundle.path}: has no target; build one with latentrt build")
    for name in bundle.manifest.targets:
        bundle.target(name)
