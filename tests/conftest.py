"""Checkpoints and bundles shared by all tests. A build traces the model, about 10 s: once a run."""

import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-deepseek-v2"
VOCAB_SIZE = 320  # 256 bytes, bos, eos, and some merges
TINY = dict(vocab_size=VOCAB_SIZE, hidden_size=64, kv_lora_rank=64, num_attention_heads=4)


def save_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of VOCAB_SIZE ids with bos 0, eos 1, and the example's chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = json.loads((EXAMPLE / "tokenizer_config.json").read_text())["chat_template"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True,
              "clean_up_tokenization_spaces": False, "chat_template": template}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(shared, tmp_path_factory) -> Path:
    """Random float32 weights: q_lora_rank, group_limited_greedy, a dense first layer, a shared expert, YaRN; a tokenizer."""
    from tests import builds, checkpoints

    def write(folder: Path) -> None:
        checkpoints.write(folder, **TINY)
        save_tokenizer(folder)

    return builds.once(shared / "tiny", write, tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all of pytest-xdist's processes share for one run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def traced(shared):
    """See tests.builds.Traces."""
    from tests.builds import Traces

    return Traces(shared)


@pytest.fixture
def fast_trace(traced):
    """Lets a build take remembered graphs, in tests whose subject is not the trace."""
    with traced.remembered():
        yield


@pytest.fixture(scope="session")
def tiny_bundle(traced, tiny_checkpoint) -> Path:
    """`tiny_checkpoint` in fp32 for the CPU."""
    return traced.build_once("tiny", tiny_checkpoint, tiny_checkpoint.parent / "bundle", "cpu", "fp32")


@pytest.fixture(scope="session")
def example_bundle(traced, tmp_path_factory) -> Path:
    """The example model in fp32 for the CPU."""
    return traced.build_once("example", EXAMPLE, tmp_path_factory.mktemp("example") / "bundle", "cpu", "fp32")
