"""Greedy generation side by side. Where the tokens part, only a near tie of the two best logits is an excuse.

The engine generates; the reference then reads prompt and answer in one pass. As long as every token of the answer is the
reference's own first choice at that place, its greedy text is the same; the first that is not is where the two part.
"""

import numpy as np

from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.engine.pages import LatentCache
from latentrt.validation.judge.findings import Findings
from latentrt.validation.judge.tolerances import Tolerance
from latentrt.validation.reference.model import Reference
from latentrt.validation.stages.base import Stage

GREEDY = Tolerance(0, "greedy tokens may part only where the two best logits are within twice the logit limit")
PARTS = Tolerance(None, "greedy text parts at the first near tie; reported only")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 32


def compare_greedy(
    stage: Stage, reference: Reference, windows: list[np.ndarray], logits: Tolerance, findings: Findings
) -> None:
    """Continues the beginnings of a few windows on both sides; EOS is a token like any other here. logits: what a logit may be
    off by; where that is not judged, texts that part are reported only."""
    longest = min(map(len, windows[:PROMPTS]))
    new = min(NEW_TOKENS, longest // 2)
    prompts = [w[: min(PROMPT_TOKENS, longest - new)] for w in windows[:PROMPTS]]
    limit = 2 * (logits.limit or 0.0)
    unexplained = 0
    for prompt, tokens in zip(prompts, generate(stage, prompts, new), strict=True):
        entry = {"prompt": prompt, "found": tokens} | parting(reference, prompt, tokens)
        unexplained += entry["parts_at"] is not None and entry["margin"] > limit
        findings.greedy.append(entry)
    parted = [g["parts_at"] for g in findings.greedy if g["parts_at"] is not None]
    findings.judge(
        "greedy texts that part without a near tie", stage.name, unexplained, GREEDY if logits.limit else PARTS,
        f"first at generated token {min(parted)}" if unexplained else "",
    )  # fmt: skip


def parting(reference: Reference, prompt: np.ndarray, tokens: np.ndarray) -> dict:
    """parts_at: index into `tokens` of the first that the reference would not choose, or None; margin: logits between them."""
    logits = reference.logits(np.concatenate([prompt, tokens]))[len(prompt) - 1 : -1]  # [len(tokens), vocab_size]
    best = logits.argmax(-1)
    different = np.flatnonzero(best != tokens)
    if not len(different):
        return {"parts_at": None, "margin": None}
    first = int(different[0])
    return {"parts_at": first, "margin": float(logits[first, best[first]] - logits[first, tokens[first]])}


def generate(stage: Stage, prompts: list[np.ndarray], count: int) -> list[np.ndarray]:
    """`count` greedy tokens after each prompt, all sequences side by side over the cache."""
    cache = LatentCache(stage.num_pages, stage.page_size)
    tokens = [list(map(int, p)) for p in prompts]
    done = [0] * len(prompts)
    order = list(range(len(prompts)))
    for _ in range(count):
        rows = []
        for s in order:
            cache.reserve(s, len(tokens[s]))
            rows.append(SequenceRows(tokens[s][done[s] :], done[s], [len(tokens[s]) - done[s] - 1]))
            done[s] = len(tokens[s])
        best = stage.step(pack(rows, cache.block_table(order))).argmax(-1)
        for s in order:
            tokens[s].append(int(best[s]))
    return [np.array(t[len(p) :]) for t, p in zip(tokens, prompts, strict=True)]
