"""What a bundle knows of its model's text, as a Hugging Face folder without weights: for frontends that tokenize themselves."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError


def kept(bundle: Bundle) -> Path:
    """The folder in $LATENTRT_CACHE, made once: a frontend takes workers for the same only if they name the same folder."""
    folder = Path(os.environ.get("LATENTRT_CACHE", Path.home() / ".cache" / "latentrt")) / "cards" / bundle.digest
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft, contextlib.suppress(OSError):  # another one was faster
            write(bundle, Path(draft))
            shutil.copytree(draft, f"{draft}.whole")
            os.rename(f"{draft}.whole", folder)
    return folder


def write(bundle: Bundle, folder: Path) -> Path:
    """The files of tokenizer and configurations in `folder`. BundleError without a tokenizer."""
    text, manifest = bundle.manifest.text, bundle.manifest
    if text.tokenizer is None:
        raise BundleError(f"{bundle.path}: has no tokenizer, which a frontend needs; build from a checkpoint with one")
    shutil.copyfile(bundle.file(text.tokenizer), folder / "tokenizer.json")
    templates = {name: bundle.file(ref).read_text(encoding="utf-8") for name, ref in text.templates.items()}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", **text.special_tokens}
    if "default" in templates:
        tokenizer["chat_template"] = templates["default"]
    ends = [end.id for end in text.end_of_text]
    config = {"model_type": manifest.family, "architectures": ["DeepseekV2ForCausalLM"], **_plain(manifest.config)}
    config |= {"eos_token_id": ends[0] if ends else None}
    files = {"config.json": config, "tokenizer_config.json": tokenizer, "generation_config.json": {"eos_token_id": ends}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder


def _plain(config: dict) -> dict:
    """The fields that say what the model is, and none that is nothing."""
    return {name: value for name, value in config.items() if value is not None}
