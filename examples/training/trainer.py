"""The training loop. The order of the data is fixed; the learning rate follows the time used; the state is on disk."""

import ctypes
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from examples.training.config import CONFIG, SEED
from examples.training.model import RouterWatch, build_model, fuse

BATCH_TOKENS, SHORT, LONG, LONG_FROM = 4096, 256, 1024, 0.7
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 3e-3, 100, 0.1, 1.0
SAVE_EVERY_S = 180
console = Console()


@dataclass
class Progressed:
    """How far the training has come; saved with the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    cursor: int = 0
    length: int = SHORT
    tokens_by_length: dict[int, int] = field(default_factory=dict)
    schedules_minutes: list[float] = field(default_factory=list)  # more than one: resumed with another --minutes


class Batches:
    """Cuts the shuffled documents of each epoch into windows and hands them out in a fixed, resumable order."""

    def __init__(self, documents: list[np.ndarray], progressed: Progressed):
        self.documents, self.at = documents, progressed
        self.windows = self._cut()

    def _cut(self) -> np.ndarray:
        """Windows [N, length + 1] of the current epoch and length; neighbours share one token."""
        rng = np.random.default_rng([SEED, self.at.epoch, self.at.length])
        stream = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
        count = (len(stream) - 1) // self.at.length
        starts = rng.permutation(count) * self.at.length
        return np.stack([stream[start : start + self.at.length + 1] for start in starts])

    def next(self, length: int) -> torch.Tensor:
        """Token ids [B, length + 1]; a new length or the end of the corpus starts a new epoch."""
        batch = BATCH_TOKENS // length
        if length != self.at.length or self.at.cursor + batch > len(self.windows):
            self.at.epoch, self.at.cursor, self.at.length = self.at.epoch + 1, 0, length
            self.windows = self._cut()
        rows = self.windows[self.at.cursor : self.at.cursor + batch]
        self.at.cursor += batch
        return torch.from_numpy(rows.astype(np.int64))


def keep_freed_memory() -> None:
    """Stop glibc from returning large buffers to the system after each use: page faults cost a fifth of a step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats; logits [B, T, V] in any float type, targets [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, done: float) -> float:
    """Linear warm-up by steps, then a cosine to 2 % of the peak over the training time (`done` from 0 to 1)."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, done))))


class Trainer:
    """The training loop with its state on disk."""

    def __init__(self, documents: list[np.ndarray], work: Path, budget_s: float, bf16: bool, fused: bool):
        self.model, self.budget_s, self.bf16 = build_model(), budget_s, bf16
        self.watch, self.optimizer = RouterWatch(self.model), build_optimizer(self.model)
        self.state_file, self.at = work / "state.pt", Progressed()
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.at = Progressed(**state["progressed"])
            console.print(f"resuming at step {self.at.step}, {self.at.seconds:.0f} s of {budget_s:.0f} s used")
        if self.at.schedules_minutes[-1:] != [budget_s / 60]:
            self.at.schedules_minutes.append(budget_s / 60)
        self.batches, self.loss = Batches(documents, self.at), next_token_loss
        if fused:
            fuse(self.model)
            self.loss = torch.compile(next_token_loss, dynamic=False)

    def save(self) -> None:
        """Write weights, optimizer and position; an interruption leaves the previous file."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = self.state_file.with_suffix(".tmp")
        torch.save({**state, "progressed": asdict(self.at)}, temporary)
        os.replace(temporary, self.state_file)

    def step(self, ids: torch.Tensor) -> float:
        """One optimizer step on ids [B, T + 1]; returns the cross entropy in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.at.step, self.at.seconds / self.budget_s)
        self.watch.calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.model(ids[:, :-1], use_cache=False).logits
        loss = self.loss(logits, ids[:, 1:])
        (loss + CONFIG["aux_loss_alpha"] * self.watch.balance_loss(len(ids))).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def run(self, stop_after_s: float = math.inf) -> None:
        """Train until the budget (or `stop_after_s`) is used; saves every few minutes and on interruption."""
        self.model.train()
        saved_at, loss_shown = self.at.seconds, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=self.budget_s, completed=self.at.seconds)
            try:
                while self.at.seconds < min(self.budget_s, stop_after_s):
                    began = time.perf_counter()
                    ids = self.batches.next(LONG if self.at.seconds > LONG_FROM * self.budget_s else SHORT)
                    loss = self.step(ids)
                    self.at.step, self.at.tokens = self.at.step + 1, self.at.tokens + BATCH_TOKENS
                    seen = self.at.tokens_by_length
                    seen[self.at.length] = seen.get(self.at.length, 0) + BATCH_TOKENS
                    self.at.seconds += time.perf_counter() - began
                    loss_shown = 0.98 * loss_shown + 0.02 * loss if loss_shown else loss
                    rate = self.at.tokens / self.at.seconds
                    line = f"step {self.at.step} loss {loss_shown:.3f} {rate:.0f} tokens/s"
                    bar.update(task, completed=self.at.seconds, description=line)
                    if self.at.step % 50 == 0:
                        console.print(f"{line} {self.at.seconds:.0f} s epoch {self.at.epoch} length {self.at.length}")
                    if self.at.seconds - saved_at > SAVE_EVERY_S:
                        self.save()
                        saved_at = self.at.seconds
            finally:
                self.save()
