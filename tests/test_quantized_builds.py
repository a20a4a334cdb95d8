"""A quantized checkpoint from end to end: the engine and the reference against transformers on weights by the formula."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentrt.export.checkpoint import Checkpoint
from latentrt.runtime.api import load
from latentrt.validation.reference.model import Reference
from tests import checkpoints, gguf_writing
from tests.builds import build
from tests.conftest import EXAMPLE


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
def test_logits_equal_transformers_on_the_dequantized_weights(tiny_checkpoint, tmp_path, fast_trace, dtype):
    """float32 sums in another order: the project's promise of 1e-3 for fp32."""
    folder, plain = (shutil.copytree(tiny_checkpoint, tmp_path / name) for name in ("quantized", "plain"))
    save_file(checkpoints.quantize_rows(folder, dtype), plain / "model.safetensors", metadata={"format": "pt"})
    tokens = checkpoints.random_tokens([40], vocab_size=320)[0]
    expected = checkpoints.reference_logits(checkpoints.reference(plain), tokens).numpy()
    reference = Reference(Checkpoint(folder))
    assert "decoded to float32" in reference.weights
    np.testing.assert_allclose(reference.logits(np.array(tokens)), expected, atol=1e-5)
    build(folder, tmp_path / "bundle", "cpu", "fp32")
    with load(tmp_path / "bundle") as engine:
        assert engine.bundle.manifest.checkpoint.storage.startswith("compressed-tensors")
        np.testing.assert_allclose(engine.logits([tokens]), expected, atol=1e-3)


def test_a_gguf_file_alone_from_build_to_text(example_bundle, tmp_path, fast_trace):
    """Config, tokenizer, chat template and ends of text from its metadata: the same answers as of the checkpoint's folder."""
    checkpoint = Checkpoint(EXAMPLE)
    template = json.loads((EXAMPLE / "tokenizer_config.json").read_text())["chat_template"]
    fields = gguf_writing.metadata(checkpoint.raw) | gguf_writing.vocabulary() | {"tokenizer.chat_template": template}
    file = gguf_writing.write(tmp_path / "m.gguf", fields, gguf_writing.tensors_of(checkpoint))
    build(file, tmp_path / "bundle", "cpu", "fp32")
    asked = [{"role": "user", "content": "What does os.getcwd do?"}]
    with load(tmp_path / "bundle") as engine, load(example_bundle) as original:
        assert engine.bundle.manifest.config == original.bundle.manifest.config
        assert engine.eos_ids == original.eos_ids and engine.chat_tokens(asked) == original.chat_tokens(asked)
        prompts = ["def read_file(path", engine.chat_tokens(asked)]
        for ours, theirs in zip(engine.generate(prompts), original.generate(prompts), strict=True):
            assert (ours.text, ours.token_ids, ours.finish_reason) == (theirs.text, theirs.token_ids, theirs.finish_reason)
