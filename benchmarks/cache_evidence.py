"""What packed caches do to a model over long contexts and over the turns of a chat: docs/numerics.md.

    python -m benchmarks.cache_evidence

The example model in PyTorch, float32 activations, weights through each format, latents and keys through each cache format, in
steps of 512 rows. Against float32 weights and cache: KL by position and the share of expert sets that are the same, over 2,048
tokens (its whole context); KL to 8,192 tokens with YaRN's factor raised to 32, for which it was not trained; conversations,
whose answers are the float32 cache's, scored turn by turn, and answered by each format itself; and what a passage costs that
comes again, which the model has to find in its cache.
"""

import json
import platform
import re
from datetime import UTC, datetime
from typing import Annotated

import numpy as np
import tokenizers
import torch
import typer

from benchmarks.cache_numerics import EXAMPLE, ROOT, table
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models import registry
from latentrt.export.models.base import Config, page_shape, weight_name
from latentrt.planning.sizes import formats_of
from latentrt.plugins import cache_formats
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.engine.pages import LatentCache

BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
PAGE, CHUNK = 64, 512
CACHES = ("float32", "bfloat16", "fp8", "int6", "int6r", "int4")
WEIGHTS = ("fp32", "bf16", "fp8", "int8", "int4")
LONG, LONG_FACTOR, LONG_BUCKETS = 8192, 32, (512, 2048, 4096, 8192)
TURNS, ANSWER, CHATS = 24, 40, 4
PASSAGE, GIVEN, DISTANCES, PASSAGES = 48, 16, (128, 512, 1024, 1900), 10


class Model:
    """The example with its weights through `weights` and its cache in `cache_format`; one sequence at a time."""

    def __init__(self, checkpoint: Checkpoint, config: Config, weights: str, cache_format: str):
        self.config, layout, family = config, cache_formats.get(cache_format), registry.of(config)
        self.step = family.step(config, cache_format)
        parameters = {weight_name(name): p for name, p in self.step.named_parameters()}
        found = family.weights(config, layout.rotated)
        form = formats_of(found)[weights]
        for weight in found:
            value = weight.read(checkpoint.read).float()
            parameters[weight.name].data = form.decode(weight, form.encode(weight, value)).reshape(weight.shape).contiguous()
        self.shape, self.dtype = page_shape(config, cache_format, PAGE), layout.dtype
        self.routed: list[np.ndarray] = []  # chosen experts of the last call, [layers, T, k]
        self.begin(config.max_position_embeddings)

    def begin(self, longest: int) -> None:
        """An empty sequence."""
        self.length, pages = 0, 2 + -(-longest // PAGE)
        self.pages = LatentCache(pages, PAGE)
        self.pages.reserve(0, longest)
        self.caches = [torch.zeros(pages, *self.shape, dtype=self.dtype) for _ in range(self.config.num_hidden_layers)]

    @torch.no_grad()
    def feed(self, tokens: list[int], experts: bool = False) -> torch.Tensor:
        """Log-probabilities [T, vocab] float64 of the tokens after each of `tokens`."""
        found, sets = [], []
        for at in range(0, len(tokens), CHUNK):
            part = tokens[at : at + CHUNK]
            rows = SequenceRows(np.array(part), self.length, list(range(len(part))))
            batch = {k: torch.from_numpy(np.array(v)) for k, v in vars(pack([rows], self.pages.block_table([0]))).items()}
            with _Routes(self.step, sets if experts else None):
                logits, _, self.caches = self.step(batch, self.caches)
            self.length += len(part)
            found.append(logits.double().log_softmax(-1))
        if experts:
            layers = len(sets) // len(found)
            self.routed = [np.concatenate(sets[layer::layers]) for layer in range(layers)]
        return torch.cat(found)


class _Routes:
    """Notes every layer's chosen experts, sorted, in the order of layers, into `sets`; nothing for None."""

    def __init__(self, step, sets: list[np.ndarray] | None):
        self.blocks = [layer.mlp for layer in step.layers if hasattr(layer.mlp, "route")] if sets is not None else []
        self.sets, self.ops = sets, [block.route for block in self.blocks]

    def __enter__(self):
        for block, op in zip(self.blocks, self.ops, strict=True):
            block.route = lambda *given, op=op, **named: self._noted(op(*given, **named))

    def _noted(self, answer):
        self.sets.append(np.sort(answer[0].numpy(), -1))
        return answer

    def __exit__(self, *_):
        for block, op in zip(self.blocks, self.ops, strict=True):
            block.route = op


def divergence(reference: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL [T] of log-probabilities [T, V]."""
    return (reference.exp() * (reference - found)).sum(-1)


def weights_and_caches(checkpoint: Checkpoint, ids: list[int], windows: int) -> dict[str, dict[str, float]]:
    """KL by position, top-1 and agreement of expert sets, by weights and cache."""
    config, found, references = checkpoint.config, {}, []
    parts = [ids[i : i + 2048] for i in range(0, windows * 2048, 2048)]
    for weights in WEIGHTS:
        for cache in CACHES:
            model, kls, same, sets = Model(checkpoint, config, weights, cache), [], [], []
            for number, part in enumerate(parts):
                model.begin(len(part))
                mine = model.feed(part, experts=True)
                if len(references) <= number:
                    references.append((mine, model.routed))
                expected, routed = references[number]
                kls.append(divergence(expected, mine))
                same.append((mine.argmax(-1) == expected.argmax(-1)).double().mean().item())
                sets.append(np.mean([(a == b).all(-1).mean() for a, b in zip(model.routed, routed, strict=True)]))
            kl = torch.stack(kls)
            found[f"{weights}, {cache}"] = {
                "KL 0-512": kl[:, :512].mean().item(), "KL 512-2048": kl[:, 512:].mean().item(), "top-1": np.mean(same).item(),
                "same experts": np.mean(sets).item(),
            }  # fmt: skip
    return found


def long_contexts(checkpoint: Checkpoint, ids: list[int]) -> dict[str, dict[str, float]]:
    """KL by position to 8,192 tokens, and float32's own perplexity there, by cache."""
    rope = checkpoint.raw["rope_scaling"] | {"factor": LONG_FACTOR}
    config = registry.parse(checkpoint.raw | {"rope_scaling": rope, "max_position_embeddings": LONG})
    parts = [ids[i : i + LONG] for i in range(0, len(ids) - LONG + 1, LONG)]
    found, references = {}, []
    for cache in CACHES:
        model, row = Model(checkpoint, config, "fp32", cache), {}
        mine = []
        for part in parts:
            model.begin(LONG)
            mine.append(model.feed(part))
        references = references or mine
        kl = torch.stack([divergence(r, m) for r, m in zip(references, mine, strict=True)])
        loss = torch.stack([-m[:-1].gather(1, torch.tensor(p[1:])[:, None])[:, 0] for m, p in zip(mine, parts, strict=True)])
        for first, last in zip((0, *LONG_BUCKETS), LONG_BUCKETS, strict=False):
            row[f"KL {first}-{last}"] = kl[:, first:last].mean().item()
        row["perplexity"], row["perplexity from 4096"] = loss.mean().exp().item(), loss[:, 4096:].mean().exp().item()
        found[cache] = row
    return found


def chats(checkpoint: Checkpoint, tokenizer: tokenizers.Tokenizer, text: str) -> dict[str, dict[str, float]]:
    """KL by turn over the float32 cache's conversations, and in which turn a format's own answer is another one, by cache."""
    asked = list(dict.fromkeys(re.findall(r"User: (.*?)\n\nAssistant:", text)))
    questions = [asked[n * TURNS : (n + 1) * TURNS] for n in range(CHATS)]
    end = checkpoint.config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    scripts, found = [], {}
    for cache in CACHES:
        model = Model(checkpoint, checkpoint.config, "fp32", cache)
        mine = [_conversation(model, tokenizer, part, ends) for part in questions]
        scripts = scripts or mine
        kl, first = [], []
        for script, own in zip(scripts, mine, strict=True):
            kl.append(_scored(model, script))
            first.append(next((n for n, (a, b) in enumerate(zip(script, own, strict=True)) if a[1] != b[1]), TURNS))
        if cache == CACHES[0]:
            references = [logs for logs, _ in kl]
        by_turn = [[divergence(r, m).mean().item() for r, m in zip(ref, logs, strict=True)] for ref, (logs, _) in
                   zip(references, kl, strict=True)]  # fmt: skip
        turns = np.array(by_turn).mean(0)
        row = {f"KL, turns {a + 1}-{a + 6}": turns[a : a + 6].mean().item() for a in range(0, TURNS, 6)}
        found[cache] = row | {"same answers until turn": float(np.median(first)), "tokens": float(np.mean([n for _, n in kl]))}
    return found


def _conversation(model: Model, tokenizer, questions: list[str], ends: list[int]) -> list[tuple[list[int], list[int]]]:
    """(tokens that are given, tokens that the model answers), turn by turn."""
    model.begin(2048)
    turns = []
    for question in questions:
        given = tokenizer.encode(f"User: {question}\n\nAssistant:", add_special_tokens=False).ids
        given = ([tokenizer.token_to_id(BEGIN)] if not turns else []) + given
        logs, answer = model.feed(given), []
        while len(answer) < ANSWER:
            answer.append(int(logs[-1].argmax()))
            logs = model.feed(answer[-1:])
            if answer[-1] in ends:
                break
        turns.append((given, answer))
    return turns


def _scored(model: Model, script: list[tuple[list[int], list[int]]]) -> tuple[list[torch.Tensor], int]:
    """Log-probabilities of each turn's answer, and the conversation's tokens."""
    model.begin(2048)
    logs = [model.feed(given + answer)[len(given) - 1 : -1] for given, answer in script]
    return logs, model.length


def passages(checkpoint: Checkpoint, ids: list[int]) -> dict[str, dict[str, float]]:
    """Nats a token of the rest of a passage, the first time, and when its beginning comes again so many tokens later."""
    found = {}
    starts = [len(ids) // PASSAGES * n + 700 for n in range(PASSAGES)]
    for cache in CACHES:
        model, row = Model(checkpoint, checkpoint.config, "fp32", cache), dict.fromkeys(["first time"], 0.0)
        for distance in DISTANCES:
            row[f"{distance} later"] = 0.0
            for number, start in enumerate(starts):
                passage, other = ids[start : start + PASSAGE], starts[number - 3]
                filler = ids[other + PASSAGE : other + distance]
                model.begin(2048)
                logs = model.feed([*passage, *filler, *passage])
                for name, at in (("first time", 0), (f"{distance} later", PASSAGE + len(filler))):
                    rows = logs[at + GIVEN - 1 : at + PASSAGE - 1]
                    loss = -rows.gather(1, torch.tensor(passage[GIVEN:])[:, None]).mean().item()
                    row[name] += loss / PASSAGES / (len(DISTANCES) if name == "first time" else 1)
        found[cache] = row
    return found


def draw(record: dict) -> None:
    """docs/cache-evidence.png: KL by position, by turn, and by bytes a token at 512 + 64."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, part, label in ((axes[0], "8,192 tokens", "position, tokens"), (axes[1], "chat", "turn")):
        for cache in CACHES[1:]:
            columns = {k: v for k, v in record[part][cache].items() if k.startswith("KL")}
            axis.plot([int(k.rpartition("-")[2]) for k in columns], list(columns.values()), "o-", ms=3, label=cache)
        axis.set(yscale="log", xlabel=label, ylabel="KL to a float32 cache, nats")
    axes[0].legend(fontsize=8, frameon=False)
    for cache in CACHES[1:]:
        size, kl = cache_formats.get(cache).bytes_per_token(512, 64), record["8,192 tokens"][cache]["KL 4096-8192"]
        axes[2].plot(size, kl, "o")
        axes[2].annotate(cache, (size, kl), textcoords="offset points", xytext=(6, 2), fontsize=8)
    axes[2].set(yscale="log", xlabel="bytes a token and layer at 512 + 64", ylabel="KL, tokens 4,096 to 8,192")
    for axis in axes:
        axis.grid(True, color="#e6eaee")
    figure.savefig(ROOT / "docs" / "cache-evidence.png", dpi=110)


def main(
    windows: Annotated[int, typer.Option(help="Of 2,048 tokens for weights and caches.")] = 4,
    only_draw: Annotated[bool, typer.Option("--only-draw", help="Of the results that are there.")] = False,
) -> None:
    """Prints the tables as Markdown; writes benchmarks/results/cache-evidence.json and docs/cache-evidence.png."""
    results = ROOT / "benchmarks" / "results" / "cache-evidence.json"
    if only_draw:
        return draw(json.loads(results.read_text()))
    torch.set_num_threads(1)  # a model this small only loses by more
    checkpoint, text = Checkpoint(EXAMPLE), (EXAMPLE / "held_out.txt").read_text()
    tokenizer = tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    record = {
        "command": f"python -m benchmarks.cache_evidence --windows {windows}",
        "machine": platform.processor() or platform.machine(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    parts = {
        "passage, nats": lambda: passages(checkpoint, ids), "chat": lambda: chats(checkpoint, tokenizer, text),
        "8,192 tokens": lambda: long_contexts(checkpoint, ids),
        "weights, cache": lambda: weights_and_caches(checkpoint, ids, windows),
    }  # fmt: skip
    for title, measure in parts.items():
        record[title] = measure()
        print(table(title, record[title], ".3g"), "\n", flush=True)
        results.write_text(json.dumps(record, indent=1) + "\n")
    draw(record)


if __name__ == "__main__":
    typer.run(main)
