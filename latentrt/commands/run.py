"""Commands on a bundle: info, generate, chat, logits."""

import codecs
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from latentrt import interrupt
from latentrt.commands.options import BackendName, BundlePath, Device, Ranks, TargetName
from latentrt.runtime.errors import RequestError
from latentrt.runtime.sampling_params import SamplingParams

Threads = Annotated[int, typer.Option(help="Threads; 0: all cores.")]
CacheTokens = Annotated[int | None, typer.Option(help="Tokens in the latent cache; default: what 1 GiB or most of a GPU holds")]
Drafts = Annotated[int, typer.Option(min=0, help="Tokens guessed ahead in a step, from what the text repeats; 0: none.")]
BatchInvariant = Annotated[bool, typer.Option("--batch-invariant", help="The same bits whatever else runs; cpu, slower.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, errors too.")]
# Without these options the bundle's own defaults count: what the checkpoint's generation_config.json says; see latentrt info.
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.", show_default="the bundle's")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default="the bundle's")]
TopK = Annotated[int | None, typer.Option(help="0 is off.", show_default="the bundle's")]
TopP = Annotated[float | None, typer.Option(help="1 is off.", show_default="the bundle's")]
MinP = Annotated[float | None, typer.Option(help="0 is off.", show_default="the bundle's")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="1 is off.", show_default="the bundle's")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text or special token (repeatable).")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text tokens.")]

CHAT_TOKENS = 256  # the longest answer of a chat, where neither the caller nor the bundle says
_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def info(
    bundle: BundlePath,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare digests.")] = False,
    as_json: Json = False,
) -> int:
    """What is in a bundle; with --verify, whether it is whole (exit code 2 if not)."""
    with interrupt.leaves_at_once():
        from latentrt.commands import console
        from latentrt.runtime.bundle.reader import Bundle

    opened = Bundle(bundle)
    findings = console.verify(opened, quiet=as_json) if verify else console.check_files(opened) or []
    if as_json:
        evidence = {n: [str(f) for f in files] for n in opened.manifest.targets if (files := opened.evidence_files(n))}
        checked = {"verified": not findings, "findings": findings} if verify else {}
        passport = {"bundle": str(bundle), "digest": opened.digest, "manifest": opened.manifest.model_dump(mode="json")}
        print(json.dumps(passport | checked | {"evidence": evidence}))
    else:
        console.Console().print(console.info_table(opened))
        if verify and not findings:
            print("every file fits its digest")
    for finding in findings:
        console.note(f"error: {finding}", "red")
    return 2 if findings else 0


def generate(
    bundle: BundlePath,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt (repeatable).")] = None,
    prompt_file: Annotated[list[str] | None, typer.Option(help="A file that is one prompt, - for stdin (repeatable).")] = None,
    max_new_tokens: MaxNewTokens = None, temperature: Temperature = None, top_k: TopK = None, top_p: TopP = None,
    min_p: MinP = None, repetition_penalty: RepetitionPenalty = None, seed: Seed = None, stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a user's message in the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    target: TargetName = None, threads: Threads = 0, cache_tokens: CacheTokens = None, drafts: Drafts = 0,
    backend: BackendName = None, device: Device = "auto", ranks: Ranks = None, batch_invariant: BatchInvariant = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Continues prompts; several run together."""
    with interrupt.leaves_at_once():
        from latentrt.commands import console
        from latentrt.runtime.api import load

    asked = _asked(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_new_tokens, stop, ignore_eos)
    if system is not None and not chat:
        raise RequestError("--system is a message of a chat; give --chat too")
    texts = [*(prompt or []), *map(_read_prompt, prompt_file or [])]
    if not texts:
        raise RequestError("no prompt; give --prompt TEXT or --prompt-file FILE")
    single = len(texts) == 1 and not as_json
    with load(bundle, target, cache_tokens, threads, backend, device, drafts, ranks, batch_invariant) as engine:
        params = _params(engine.default_params, asked)
        before = [{"role": "system", "content": system}] if system is not None else []
        prompts = [engine.chat_tokens([*before, {"role": "user", "content": text}]) for text in texts] if chat else texts
        results = engine.generate(prompts, params, (lambda event: console.write(event.text)) if single else None)
    if as_json:
        answers = [{"prompt": text, **asdict(result)} for text, result in zip(texts, results, strict=True)]
        used = {"target": engine.backend.name, "params": asdict(params)}
        print(json.dumps({"bundle": str(bundle)} | used | {"results": answers}))
        return
    for text, result in zip(texts, results, strict=True):
        console.write("\n" if single else f"> {text}\n{result.text}\n")
        console.note(console.summary(result))


def chat(
    bundle: BundlePath,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: MaxNewTokens = None, temperature: Temperature = None, top_k: TopK = None, top_p: TopP = None,
    min_p: MinP = None, repetition_penalty: RepetitionPenalty = None, seed: Seed = None, stop: Stop = None,
    ignore_eos: IgnoreEos = False, target: TargetName = None, threads: Threads = 0, cache_tokens: CacheTokens = None,
    drafts: Drafts = 0, backend: BackendName = None, device: Device = "auto", ranks: Ranks = None,
    batch_invariant: BatchInvariant = False,
) -> int:  # fmt: skip
    """Talks: one line, one turn. /reset forgets the history, /exit leaves; stdin may be a pipe."""
    with interrupt.leaves_at_once():
        from latentrt.commands import console
        from latentrt.runtime.api import load
        from latentrt.runtime.chat import Conversation

    asked = _asked(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_new_tokens, stop, ignore_eos)
    with load(bundle, target, cache_tokens, threads, backend, device, drafts, ranks, batch_invariant) as engine:
        said = engine.bundle.manifest.text.sampling
        params = _params(engine.default_params, {"max_new_tokens": said.get("max_new_tokens", CHAT_TOKENS)} | asked)
        return 0 if console.chat_loop(Conversation(engine, params, system)) else 2


def logits(
    bundle: BundlePath,
    tokens: Annotated[Path, typer.Option(help="JSON file: a list of token-id lists.")],
    out: Annotated[Path, typer.Option(help="File to write: the lists' logits one after another, [T, vocab] float32.")],
    target: TargetName = None, threads: Threads = 0, cache_tokens: CacheTokens = None,
    backend: BackendName = None, device: Device = "auto", ranks: Ranks = None, batch_invariant: BatchInvariant = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Teacher-forced logits at every position."""
    with interrupt.leaves_at_once():
        from latentrt.runtime.api import load

    lists = _read_token_lists(tokens)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise RequestError(f"{out}: {'is a folder' if out.is_dir() else 'its folder is missing'}; give a file to write")
    with load(bundle, target, cache_tokens, threads, backend, device, 0, ranks, batch_invariant) as engine:
        blocks, shape = engine.logit_blocks(lists), (sum(map(len, lists)), engine.vocab_size)
        _write_rows(out, shape, blocks)
    report = {"out": str(out), "shape": shape, "dtype": "float32"}
    print(json.dumps(report) if as_json else f"{out}: logits {list(shape)} float32")


def _asked(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_new_tokens, stop, ignore_eos) -> dict:
    """The fields of SamplingParams that were given; checked, before a bundle is loaded."""
    numbers = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed,
               "repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}  # fmt: skip
    asked = {name: value for name, value in numbers.items() if value is not None}
    asked |= {"stop": tuple(stop or ()), "ignore_eos": ignore_eos}
    SamplingParams(**asked)
    return asked


def _params(default: SamplingParams, asked: dict) -> SamplingParams:
    """What was given, and the bundle's defaults for the rest."""
    params = replace(default, **asked)
    off = {"top_k": 0, "top_p": 1, "min_p": 0, "seed": None}
    idle = [name.replace("_", "-") for name, nothing in off.items() if asked.get(name, nothing) != nothing]
    if params.temperature == 0 and idle:
        from latentrt.commands import console

        console.note(f"note: {', '.join(idle)} has no effect at temperature 0 (greedy); give --temperature")
    return params


def _read_prompt(name: str) -> str:
    """The text of a file, without a byte-order mark and without the one line end that editors put last."""
    raw = sys.stdin.buffer.read() if name == "-" else _read(Path(name))
    mark = next((mark for mark in _BOMS if raw.startswith(mark)), b"")
    try:
        text = raw.removeprefix(mark).decode(_BOMS.get(mark, "utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: is not UTF-8 text ({error}); give a UTF-8 file") from None
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _read_token_lists(path: Path) -> list[list[int]]:
    content = _read(path)
    try:
        lists = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not valid JSON ({error}); give a list of token-id lists") from None
    if not isinstance(lists, list) or not lists:
        raise RequestError(f"{path}: holds {_kind(lists)}; give a list of token-id lists, such as [[1, 2, 3]]")
    for index, entry in enumerate(lists):
        if not isinstance(entry, list):
            raise RequestError(f"{path}: entry {index} is {_kind(entry)}; give a list of token-id lists, such as [[1, 2, 3]]")
    return lists


def _kind(value) -> str:
    return "an empty list" if value == [] else f"{type(value).__name__} {str(value)[:40]}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


def _write_rows(out: Path, shape: tuple[int, int], blocks) -> None:
    """Fills a .npy file block by block; it appears under its name when it is whole."""
    import numpy as np

    draft = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        with draft.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for block in blocks:
                stream.write(np.ascontiguousarray(block, np.float32).data)
        os.replace(draft, out)
    except OSError as error:
        raise RequestError(f"{out}: cannot be written ({error.strerror}); free some space or give another file") from None
    finally:
        draft.unlink(missing_ok=True)
