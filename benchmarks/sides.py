"""The engines that benchmarks/cpu.py compares, each in a process of its own.

    python benchmarks/sides.py SIDE MODEL THREADS

answers one line of JSON for each line of JSON that it reads: {"do": "case", "batch", "depth", "new"} gets ready, {"do":
"steps", "count"} gives the seconds of each step, {"do": "memory"} bytes, {"do": "logits", "tokens", "out"} writes float32
logits of all positions as .npy. A step computes `new` tokens of each of `batch` sequences that have `depth` tokens in the
cache, with logits for the last ones; the next step does the same again. The first line, unasked, tells what loading took. Needs
NumPy and the engine alone.
"""

import ctypes
import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

VOCABULARY = 32000  # ids are below this, in all stand-ins


def tokens(batch: int, count: int) -> np.ndarray:
    """[batch, count], the same for every side."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (batch, count))


class Side(ABC):
    """A loaded model. `case` may be called again and again."""

    note = ""  # what a case was run with

    @abstractmethod
    def case(self, batch: int, depth: int, new: int) -> None:
        """Gets ready for steps of this size."""

    @abstractmethod
    def step(self) -> None:
        """One of them, to the logits on the host."""

    @abstractmethod
    def logits(self, prompt: np.ndarray) -> np.ndarray:
        """[len(prompt), vocab_size] float32."""


class Ours(Side):
    """A bundle, through the backend that serves it. Prompts go through in chunks, as the scheduler cuts them."""

    def __init__(self, model: Path, threads: int):
        from latentrt.runtime import backends
        from latentrt.runtime.bundle.reader import Bundle

        self._load = lambda count: backends.load(Bundle(model), cache_tokens=count, threads=threads)
        self.backend = self._load(1024)

    def case(self, batch: int, depth: int, new: int) -> None:
        from latentrt.runtime.backends.base import SequenceRows, pack
        from latentrt.runtime.engine.pages import LatentCache

        self.backend.close()
        self.backend = self._load(batch * (depth + new + 64))
        cache = LatentCache(self.backend.num_pages, self.backend.target.cache.page_size)
        for b in range(batch):
            cache.reserve(b, depth + new)
        table = cache.block_table(list(range(batch)))
        ids, chunk = tokens(batch, new), self.backend.lone_prefill_chunk
        self.batches = []
        for start in range(0, new, chunk):
            part = ids[:, start : start + chunk]
            wanted = [part.shape[1] - 1] if start + chunk >= new else []
            self.batches.append(pack([SequenceRows(row, depth + start, wanted) for row in part], table))

    def step(self) -> None:
        for batch in self.batches:
            result = self.backend.step(batch)
        result.logits()

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        from latentrt.runtime.backends.base import SequenceRows, pack

        self.case(1, 0, len(prompt))
        table = self.batches[0].block_table
        return self.backend.step(pack([SequenceRows(prompt, 0, range(len(prompt)))], table)).logits().copy()


class LlamaCpp(Side):
    """A GGUF file through llama-cpp-python's ctypes. A case takes flash attention or not, whichever is faster in one step.

    Sequences have streams of their own in the cache; its depth is computed once, and copied into the other sequences.
    """

    flash = (1, 0)  # LLAMA_FLASH_ATTN_TYPE_ENABLED, DISABLED
    spare = 256  # the cache is allocated and attended in blocks of this many tokens

    def __init__(self, model: Path, threads: int):
        self.api, self.threads = self.bind(), threads
        self.api.llama_backend_init()
        self.model = self.api.llama_model_load_from_file(str(model).encode(), self.model_params())
        if not self.model:
            raise RuntimeError(f"{model} does not load")
        self.context, self.filled = None, {}
        self.open(1, 512, self.flash[0])

    def bind(self):
        import llama_cpp

        self.memory = llama_cpp.llama_get_memory
        self.seq_rm, self.seq_cp = llama_cpp.llama_memory_seq_rm, llama_cpp.llama_memory_seq_cp
        return llama_cpp

    def model_params(self):
        return self.api.llama_model_default_params()

    def open(self, batch: int, length: int, flash: int) -> None:
        """A context for `batch` sequences of `length` tokens."""
        if self.context:
            self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx = batch * -(-(length + self.spare) // self.spare) * self.spare
        params.n_seq_max = batch
        params.n_batch = max(2048, batch)
        params.n_threads = params.n_threads_batch = self.threads
        self.set_flash(params, flash)
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"no context for {batch} sequences of {length} tokens")

    def set_flash(self, params, flash: int) -> None:
        params.flash_attn_type, params.kv_unified = flash, False

    def case(self, batch: int, depth: int, new: int) -> None:
        seconds = {}
        for flash in self.flash:
            self._ready(batch, depth, new, flash)
            self.step() if new == 1 else None
            start = time.perf_counter()
            self.step()
            seconds[flash] = time.perf_counter() - start
        best = min(seconds, key=seconds.get)
        if best != self.flash[-1]:
            self._ready(batch, depth, new, best)
        self.note = f"flash attention {'on' if best else 'off'}"

    def _ready(self, batch: int, depth: int, new: int, flash: int) -> None:
        self.open(batch, depth + new, flash)
        self.fill(batch, depth, flash)
        self.depth, self.rows = depth, tokens(batch, new)

    def fill(self, batch: int, depth: int, flash: int) -> None:
        """Depth tokens in all sequences: computed the first time, copied later."""
        if not depth:
            return
        if (flash, batch, depth) not in self.filled:
            for start in range(0, depth, 2048):
                self.decode(tokens(1, depth)[:, start : start + 2048], start)
            size = self.api.llama_state_seq_get_size(self.context, 0)
            self.filled[flash, batch, depth] = (ctypes.c_uint8 * size)()
            if not self.api.llama_state_seq_get_data(self.context, self.filled[flash, batch, depth], size, 0):
                raise RuntimeError("the cache of a sequence cannot be saved")
        state = self.filled[flash, batch, depth]
        for b in range(batch):
            if not self.api.llama_state_seq_set_data(self.context, state, len(state), b):
                raise RuntimeError(f"the cache of a sequence cannot be copied, {depth} tokens")

    def decode(self, rows: np.ndarray, start: int, every: bool = False) -> None:
        """rows [batch, new] at positions from `start` on; logits of the last of each row, or of every one."""
        batch = self.api.llama_batch_init(rows.size, 0, 1)
        batch.n_tokens = rows.size
        for i, ((sequence, offset), token) in enumerate(np.ndenumerate(rows)):
            batch.token[i], batch.pos[i] = int(token), start + offset
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = every or offset == rows.shape[1] - 1
        code = self.api.llama_decode(self.context, batch)
        self.api.llama_get_logits_ith(self.context, -1)  # waits for them
        self.api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode gives {code}")

    def step(self) -> None:
        for start in range(0, self.rows.shape[1], 2048):
            self.decode(self.rows[:, start : start + 2048], self.depth + start)
        for b in range(len(self.rows)):
            self.seq_rm(self.memory(self.context), b, self.depth, -1)

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        self.open(1, len(prompt), self.flash[0])
        self.decode(prompt[None], 0, every=True)
        rows = [self.api.llama_get_logits_ith(self.context, i) for i in range(len(prompt))]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary(),)).copy() for row in rows])

    def vocabulary(self) -> int:
        return self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))


class IkLlamaCpp(LlamaCpp):
    """ik_llama.cpp through ik-llama-cpp-python, MLA 3, weights repacked. Never ran yet."""

    flash = (1,)

    def bind(self):
        from ik_llama_cpp import _ctypes_api as api

        pointer, integer, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t
        self.seq_rm = self._function(api, "llama_kv_cache_seq_rm", [pointer, integer, integer, integer], ctypes.c_bool)
        self.memory = lambda context: context
        octets = ctypes.POINTER(ctypes.c_uint8)
        self._function(api, "llama_state_seq_get_size", [pointer, integer, ctypes.c_uint32], size)
        self._function(api, "llama_state_seq_get_data", [pointer, octets, size, integer, ctypes.c_uint32], size)
        self._function(api, "llama_state_seq_set_data", [pointer, octets, size, integer, ctypes.c_uint32], size)
        get, take, put = api.llama_state_seq_get_size, api.llama_state_seq_get_data, api.llama_state_seq_set_data
        api.llama_state_seq_get_size = lambda *given: get(*given, 0)
        api.llama_state_seq_get_data = lambda *given: take(*given, 0)
        api.llama_state_seq_set_data = lambda *given: put(*given, 0)
        return api

    @staticmethod
    def _function(api, name: str, arguments: list, result):
        found = getattr(api._lib, name)
        found.argtypes, found.restype = arguments, result
        setattr(api, name, found)
        return found

    def model_params(self):
        params = self.api.llama_model_default_params()
        params.repack_tensors, params.use_mmap = True, False
        return params

    def set_flash(self, params, flash: int) -> None:
        params.flash_attn, params.mla_attn = bool(flash), 3


class Transformers(Side):
    """transformers in bf16 with its own cache (keys and values of all heads), cropped back after every step."""

    def __init__(self, model: Path, threads: int):
        import torch
        from transformers import DeepseekV2ForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = DeepseekV2ForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def case(self, batch: int, depth: int, new: int) -> None:
        import torch

        self.ids, self.cache = torch.from_numpy(tokens(batch, new)), None
        if depth:  # of zeros: what is in it does not matter for time
            self.cache = self.model(self.ids[:, :1], use_cache=True).past_key_values
            for layer in self.cache.layers:
                layer.keys, layer.values = (
                    x.new_zeros(batch, x.shape[1], depth, x.shape[3]) for x in (layer.keys, layer.values)
                )

    def step(self) -> None:
        self.model(self.ids, past_key_values=self.cache, use_cache=self.cache is not None, logits_to_keep=1)
        if self.cache is not None:
            self.cache.crop(-self.ids.shape[1])

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        import torch

        return self.model(torch.from_numpy(prompt[None])).logits[0].float().numpy()


ENGINES = {"ours": Ours, "llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlamaCpp, "transformers": Transformers}


def memory() -> dict[str, int]:
    """Bytes that belong to this process alone: written ones (anonymous memory), and those of files that no other maps."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    found = {name.rstrip(":"): 1024 * int(size) for name, size, *_ in lines}
    return {"private": found["Private_Dirty"], "anonymous": found["Anonymous"], "resident": found["Rss"]}


def serve(side: Side, answer) -> None:
    """Until the input ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer({"ok": True} | run(side, asked))
        except (RuntimeError, ValueError, MemoryError, AttributeError) as error:
            answer({"error": f"{type(error).__name__}: {error}"})


def run(side: Side, asked: dict) -> dict:
    """The answer to one line."""
    if asked["do"] == "case":
        side.case(asked["batch"], asked["depth"], asked["new"])
        return {"note": side.note}
    if asked["do"] == "memory":
        return memory()
    if asked["do"] == "logits":
        np.save(asked["out"], side.logits(np.asarray(asked["tokens"])))
        return {}
    seconds = []
    for _ in range(asked["count"]):
        start = time.perf_counter()
        side.step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def main() -> None:
    name, model, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer

    def answer(record: dict) -> None:
        stream.write(json.dumps(record) + "\n")
        stream.flush()

    start, before = time.perf_counter(), memory()["private"]
    side = ENGINES[name](model, threads)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer({"ok": True, "load_s": time.perf_counter() - start, "before": before, "peak": peak} | memory())
    serve(side, answer)


if __name__ == "__main__":
    main()
