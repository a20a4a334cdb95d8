"""Trains the example checkpoint `tiny-deepseek-v2` from nothing but this Python installation. Nothing is downloaded.

    python -m examples.training --out examples/tiny-deepseek-v2 --minutes 30

The model is transformers' own, so the checkpoint is a reference that does not depend on latentrt. Interrupt it at any
time: the same command goes on from the last saved state (`--work`). A slow machine ends its schedule, too.
"""

import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer

from examples.training.config import BOS, CONFIG, EOS, SEED
from examples.training.corpus import build_corpus
from examples.training.model import checkpoint_tensors
from examples.training.record import judge, static_files, write_folder, write_record
from examples.training.tokenizer import encode_documents, loosen_spaces, train_tokenizer
from examples.training.trainer import Trainer, console, keep_freed_memory

WORK = Path(tempfile.gettempdir()) / "train-tiny-deepseek-v2"


def prepare(work: Path) -> tuple[Tokenizer, list[np.ndarray], str]:
    """Corpus and tokenizer: (tokenizer, training documents as ids, held-out text). The tokenizer is kept in `work`."""
    corpus = build_corpus()
    file = work / "tokenizer.json"
    if not file.exists():
        train_tokenizer(corpus.train(), CONFIG["vocab_size"]).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    documents = loosen_spaces(tokenizer, encode_documents(tokenizer, corpus.train()))
    sizes = {kind: len(getattr(corpus, kind)) for kind in ("code", "prose", "chat", "held_out")}
    console.print(f"documents {sizes}, {sum(map(len, documents))} training tokens")
    return tokenizer, documents, "".join(f"{BOS}{text}{EOS}" for text in corpus.held_out)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the finished checkpoint.")],
    minutes: Annotated[float, typer.Option(help="Training time; the schedule ends with it.")] = 30.0,
    work: Annotated[Path, typer.Option(help="Folder of the state to resume from.")] = WORK,
    first: Annotated[float, typer.Option(help="Minutes after which a first checkpoint is written; 0: none.")] = 0.0,
    bf16: Annotated[bool, typer.Option(help="Matrix products in bf16 (fast on CPUs with AMX).")] = True,
    fused: Annotated[bool, typer.Option(help="torch.compile the layers; needs a C++ compiler.")] = True,
) -> None:
    """Train the example model and write it, with the record of its training, to OUT."""
    work.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    tokenizer, documents, held_out = prepare(work)
    files = static_files(tokenizer, held_out)
    trainer = Trainer(documents, work, minutes * 60, bf16, fused)
    try:
        if first:
            trainer.run(stop_after_s=first * 60)
            write_folder(out, files, checkpoint_tensors(trainer.model.state_dict()))
        trainer.run()
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        raise typer.Exit(130) from None
    write_folder(out, files, checkpoint_tensors(trainer.model.state_dict()))
    record = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "tokens_seen": trainer.at.tokens,
        "training_tokens_in_corpus": sum(map(len, documents)),
        "tokens_by_window_length": trainer.at.tokens_by_length,
        "schedules_minutes": trainer.at.schedules_minutes,
        "steps": trainer.at.step,
        "training_seconds": round(trainer.at.seconds),
        "tokens_per_second": round(trainer.at.tokens / trainer.at.seconds),
        "machine": f"{platform.machine().replace('_', '-')}, {os.cpu_count()} cores, CPU",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m examples.training --out {out} --minutes {minutes:g}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": SEED,
        **judge(out, documents),
    }
    write_record(out, record)
    console.print_json(data=record)


if __name__ == "__main__":
    typer.run(main)
