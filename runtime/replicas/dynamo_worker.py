"""A worker of NVIDIA Dynamo over a bundle: `python -m latentrt.runtime.replicas.dynamo_worker BUNDLE`; see docs/replicas.md.

Dynamo's frontend templates, tokenizes, applies stop strings and speaks OpenAI's API; a worker takes and gives token ids. If one
dies, the frontend sends its requests, with the tokens that they have, to another.
"""

import argparse
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.logprobs import parse_logprob_options
from dynamo.common.backend.run import run
from dynamo.llm.exceptions import InvalidArgument

from latentrt.runtime.api import load
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.engine.sequence import Event
from latentrt.runtime.errors import RequestError
from latentrt.runtime.replicas import card
from latentrt.runtime.sampling_params import SamplingParams
from latentrt.runtime.service import Ask, BusyError, EngineService
from latentrt.runtime.structured import Constraint

ANSWER = 16  # tokens where a request does not say: OpenAI's default of completions
_KINDS = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choice"}  # Dynamo's words -> ours
_ASIDE = ("backend", "whitespace_pattern")  # of guided_decoding, beside the constraint


class Worker(LLMEngine):
    """One engine behind Dynamo."""

    def __init__(self, asked: argparse.Namespace):
        self._asked = asked
        self._service: EngineService | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple["Worker", WorkerConfig]:
        """From the command line. The model's card is written first, for the frontend to read."""
        asked = _parser().parse_args(argv)
        path = card.kept(Bundle(asked.bundle))
        name = asked.model or asked.bundle.resolve().name
        config = WorkerConfig(
            namespace=asked.namespace, component="latentrt", model_name=str(path), served_model_name=name,
            endpoint_types="chat,completions", discovery_backend=asked.discovery_backend, request_plane="tcp",
            event_plane="zmq",
            enable_kv_routing=False,  # its events would be sent to whoever connects, on all addresses
        )  # fmt: skip
        asked.model, asked.card = name, str(path)
        return cls(asked), config

    async def start(self, worker_id: int) -> EngineConfig:
        """Loads the engine."""
        a = self._asked
        engine = load(a.bundle, a.target, a.cache_tokens, a.threads, a.backend, a.device, batch_invariant=a.batch_invariant)
        self._service = EngineService(engine, a.max_waiting)
        await self._service.start()
        schedulers, size = engine.loop.schedulers, engine.backend.target.cache.page_size
        return EngineConfig(model=a.card, served_model_name=a.model, llm=LlmRegistration(
            context_length=engine.limits.max_context, kv_cache_block_size=size, total_kv_blocks=schedulers.capacity // size,
            max_num_seqs=schedulers.max_running, max_num_batched_tokens=engine.limits.max_batch_tokens,
        ))  # fmt: skip

    async def generate(self, request, context) -> AsyncGenerator[dict, None]:
        """Token ids of one answer, as they come; InvalidArgument for what the engine does not take."""
        engine = self._service.engine
        logprobs, _ = parse_logprob_options(request.get("output_options") or {})
        try:
            tokens = engine.prompt_tokens(_with_bos(engine, list(request["token_ids"])))
            params = _params(request, logprobs, engine.limits.max_context - len(tokens))
            running = await self._service.submit([Ask(tokens, params)])
        except (RequestError, BusyError) as error:
            raise InvalidArgument(str(error)) from None
        try:
            async for events in running:
                for event in events:
                    yield self._chunk(event, len(tokens))
                if context.is_stopped():
                    return
        finally:
            running.abort()
            if not self._service.alive:  # another worker takes its requests, and whoever started this one starts it again
                os.kill(os.getpid(), signal.SIGTERM)

    async def drain(self) -> None:
        """Takes no more requests, and lets those that there are end."""
        if self._service:
            await self._service.drain(self._asked.drain_seconds)

    async def cleanup(self) -> None:
        """Ends the engine."""
        if self._service:
            await self._service.stop()

    def _chunk(self, event: Event, prompt: int) -> dict:
        if event.error:
            raise RuntimeError(str(event.error))
        chunk: dict = {"token_ids": [] if event.token is None else [event.token], "index": 0}
        if event.logprobs:
            chunk["log_probs"] = [event.logprobs.logprob]
            chunk["top_logprobs"] = [[self._told(rank, *told) for rank, told in enumerate(event.logprobs.top, 1)]]
        if event.result:
            answered, reused = len(event.result.token_ids), event.result.reused_tokens
            chunk["finish_reason"] = "stop" if event.result.finish_reason == "stop" else "length"
            chunk["completion_usage"] = {
                "prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered,
                "prompt_tokens_details": {"cached_tokens": reused},
            }  # fmt: skip
        return chunk

    def _told(self, rank: int, token: int, logprob: float) -> dict:
        text = self._service.engine.needed_tokenizer().decode([token], skip_special=False)
        return {"rank": rank, "token_id": token, "token": text, "logprob": logprob}


def _with_bos(engine, tokens: list[int]) -> list[int]:
    """A chat template writes the first token itself; Dynamo puts none before a plain text."""
    before = engine.needed_tokenizer().encode("")
    return tokens if tokens[: len(before)] == before else [*before, *tokens]


def _params(request, logprobs: int | None, room: int) -> SamplingParams:
    """A request's options in our words. RequestError for a value that is not accepted."""
    asked, stop = request.get("sampling_options") or {}, request.get("stop_conditions") or {}
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    given = {name: asked[name] for name in names if asked.get(name) is not None}
    given["top_k"] = max(given.get("top_k", 0), 0)  # -1 is off
    temperature = asked.get("temperature")
    return SamplingParams(
        temperature=1.0 if temperature is None else temperature, logprobs=logprobs,
        max_new_tokens=max(1, min(stop.get("max_tokens") or ANSWER, room)), min_new_tokens=stop.get("min_tokens") or 0,
        ignore_eos=bool(stop.get("ignore_eos")), stop_token_ids=tuple(stop.get("stop_token_ids_hidden") or ()),
        constraint=_constraint(asked.get("guided_decoding") or {}), **given,
    )  # fmt: skip


def _constraint(guided: dict) -> Constraint | None:
    """What an answer must follow. RequestError for kinds that are not known here."""
    found = {name: value for name, value in guided.items() if value is not None and name not in _ASIDE}
    unknown = [name for name in found if name not in _KINDS]
    if unknown or len(found) > 1:
        raise RequestError(f"guided_decoding has {', '.join(found)}, accepted: one of {', '.join(_KINDS)}")
    for name, value in found.items():
        return Constraint(_KINDS[name], tuple(value) if name == "choice" else value)
    return None


def _parser() -> argparse.ArgumentParser:
    name = "python -m latentrt.runtime.replicas.dynamo_worker"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", help="what requests call it; the folder's name by default")
    parser.add_argument("--namespace", default="dynamo")
    parser.add_argument("--discovery-backend", default="file", help="file ($DYN_FILE_KV is its folder) or etcd")
    parser.add_argument("--max-waiting", type=int, default=256, help="answers that may wait; more are refused")
    parser.add_argument("--drain-seconds", type=float, default=30.0)
    parser.add_argument("--target")
    parser.add_argument("--backend")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache-tokens", type=int)
    parser.add_argument("--batch-invariant", action="store_true")
    return parser


if __name__ == "__main__":
    run(Worker)
