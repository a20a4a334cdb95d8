"""What a build makes of a checkpoint's text files: the same ids and templates as transformers, and clear refusals."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from latentrt.export import text as texts
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import CheckpointError
from tests import checkpoints
from tests.conftest import EXAMPLE, save_tokenizer
from tests.texts import baked, edit_json, save_deepseek_like, save_sentencepiece, save_vocab_and_merges, tokenizer_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDED = dict(lstrip=False, rstrip=False, normalized=False, single_word=False)
TEXT = "def  f(x):\n    return 1234 + x  # 你好, Größe!\r\n<|im_start|>user<|im_end|> <eos> a"
SETTINGS = settings(max_examples=60, deadline=None)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tokenizer(tmp_path)


def decoder(**specials: bool) -> dict:
    """added_tokens_decoder with the two tokens of ChatML after the vocabulary, and whether each is special."""
    tokens = {"start": "<|im_start|>", "end": "<|im_end|>"}
    return {str(320 + n): dict(ADDED, content=tokens[k], special=s) for n, (k, s) in enumerate(specials.items())}


def in_decoder(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder(start=True, end=True))


def in_decoder_not_special(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder(start=False, end=False))


def in_added_tokens(folder: Path) -> None:
    edit_json(folder / "added_tokens.json", **{"<|im_end|>": 321, "<|im_start|>": 320})


def in_added_tokens_as_eos(folder: Path) -> None:
    edit_json(folder / "added_tokens.json", **{"<|im_start|>": 320, "<|im_end|>": 321})
    edit_json(folder / "special_tokens_map.json", eos_token={"content": "<|im_end|>", **ADDED})


def as_roles(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])


@pytest.mark.parametrize("add", [in_decoder, in_decoder_not_special, in_added_tokens, in_added_tokens_as_eos, as_roles])
def test_added_tokens_are_those_of_transformers(folder, add):
    add(folder)
    reference, ours = AutoTokenizer.from_pretrained(folder), tokenizer_of(folder)
    assert ours.encode(TEXT) == reference.encode(TEXT) and {320, 321} <= set(ours.encode(TEXT))
    assert ours.decode(ours.encode(TEXT)) == reference.decode(reference.encode(TEXT), skip_special_tokens=True)
    assert ours.decode(ours.encode(TEXT), skip_special=False) == reference.decode(reference.encode(TEXT))
    assert (ours.vocab_size, ours.special_tokens) == (len(reference), reference.special_tokens_map)


@SETTINGS
@given(st.text(max_size=40))
def test_text_round_trips_through_deepseeks_own_pipeline(text):
    """transformers 5 must not rebuild it as a LlamaTokenizer; add_bos_token counts as it did in training."""
    ids = DEEPSEEK.encode(text, special=False)
    assert ids == DEEPSEEK_FILE.encode(text, add_special_tokens=False).ids
    assert ids == DEEPSEEK_AUTO.encode(text, add_special_tokens=False)
    assert DEEPSEEK.decode(ids, skip_special=False) == text
    assert DEEPSEEK.encode(text)[0] == 0


@pytest.fixture(scope="module", autouse=True)
def _deepseek(tmp_path_factory):
    global DEEPSEEK, DEEPSEEK_FILE, DEEPSEEK_AUTO
    folder = save_deepseek_like(tmp_path_factory.mktemp("deepseek"))
    DEEPSEEK, DEEPSEEK_FILE = tokenizer_of(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    DEEPSEEK_AUTO = AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeLlamaTokenizer", "LlamaTokenizer", "NoSuchTokenizer", ...])
def test_the_class_in_the_config_changes_no_ids_of_a_tokenizer_json(tmp_path, name):
    folder = edit_json(save_deepseek_like(tmp_path) / "tokenizer_config.json", tokenizer_class=name)
    assert tokenizer_of(folder).encode(TEXT) == DEEPSEEK.encode(TEXT)


def test_a_sentencepiece_model_is_converted(tmp_path):
    from sentencepiece import SentencePieceProcessor

    folder = save_sentencepiece(tmp_path)
    ours, reference = tokenizer_of(folder), AutoTokenizer.from_pretrained(folder)
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("hello the  world", "x ", "é\n你好 hello", ""):
        assert ours.encode(text) == reference.encode(text) == [1, *original.encode(text)]
        assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text), skip_special_tokens=True) == text
    assert ours.encode(" x") == reference.encode(" x")  # sentencepiece adds one more blank in front; transformers 5 does not
    assert baked(folder).source == "tokenizer.model, LlamaTokenizer"


@pytest.mark.parametrize(("model_type", "name"), [(1, "LlamaTokenizer"), (2, "PreTrainedTokenizerFast"), (1, ...)])
def test_a_conversion_that_changes_ids_is_refused(tmp_path, model_type, name):
    """transformers 5.23 makes BPE of any unigram model, and forgets the blank in front without the right class."""
    folder = edit_json(save_sentencepiece(tmp_path, model_type) / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(CheckpointError, match=r"tokenizer.model: transformers .* makes (other ids|no tokenizer).*\.json"):
        baked(folder)


def test_vocab_and_merges_are_converted(tmp_path):
    folder = save_vocab_and_merges(tmp_path)
    ours, reference = tokenizer_of(folder), AutoTokenizer.from_pretrained(folder)
    example = tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    assert ours.encode(TEXT) == reference.encode(TEXT) == example.encode(TEXT).ids
    assert ours.decode(ours.encode(TEXT)) == TEXT
    edit_json(folder / "tokenizer_config.json", tokenizer_class=...)
    with pytest.raises(CheckpointError, match=r"vocab.json: transformers .* with tokenizer_class None"):
        baked(folder)


def test_without_a_tokenizer_there_are_token_ids_only(tmp_path):
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, 1])
    text = baked(tmp_path, eos_token_id=1)
    assert (text.tokenizer, text.templates, text.source) == (None, {}, "")
    assert [(end.id, end.token, end.sources) for end in text.end_of_text] == [
        (1, None, ("config.json", "generation_config.json")), (7, None, ("generation_config.json",)),
    ]  # fmt: skip


def test_the_end_of_text_is_the_union(folder):
    in_decoder(folder)
    edit_json(folder / "tokenizer_config.json", chat_template=CHATML)
    edit_json(folder / "generation_config.json", eos_token_id=[1, 300])
    ends = {end.id: (end.token, end.sources) for end in baked(folder, eos_token_id=5).end_of_text}
    assert ends.pop(5)[1] == ("config.json",) and ends.pop(300)[1] == ("generation_config.json",)
    assert ends == {1: ("<eos>", ("generation_config.json", "tokenizer")), 321: ("<|im_end|>", ("chat template",))}


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ messages[0].content }}", "<eos>", ""])
def test_a_template_that_says_nothing_about_ends(folder, template):
    edit_json(folder / "tokenizer_config.json", chat_template=template, eos_token="<bos>")
    assert [end.id for end in baked(folder).end_of_text] == [0]


def test_templates_by_name_and_in_files(folder):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert baked(folder).templates == {"default": "a", "tool_use": "b"}
    (folder / "chat_template.jinja").write_text("{{ 'ü' }}")
    assert baked(folder).templates == {"default": "{{ 'ü' }}"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("d")
    assert baked(folder).templates == {"default": "{{ 'ü' }}", "rag": "d"}
    assert AutoTokenizer.from_pretrained(folder).chat_template == baked(folder).templates


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "temperature": 0.3, "top_k": None}, {"temperature": 0.3, "top_k": 50}),
        ({"do_sample": True, "top_k": -1, "min_p": 0.1}, {"temperature": 1.0, "top_k": 0, "min_p": 0.1}),
        ({"repetition_penalty": 1.1, "max_new_tokens": 99}, {"repetition_penalty": 1.1, "max_new_tokens": 99}),
    ],
)
def test_sampling_defaults(tmp_path, generation, sampling):
    edit_json(tmp_path / "generation_config.json", **generation)
    assert baked(tmp_path).sampling == sampling


def test_generation_settings_that_are_not_applied_are_said(tmp_path):
    edit_json(tmp_path / "generation_config.json", num_beams=4, typical_p=1.0, min_length=0, stop_strings=["x"])
    assert baked(tmp_path).ignored == ("num_beams 4", "stop_strings ['x']")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5, accepted: a string, or an object"),
        ("tokenizer_config.json", {"bos_token": {"text": "<s>"}}, "bos_token is .*accepted: a string"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token is 'yes', accepted: true or false"),
        ("tokenizer_config.json", {"tokenizer_class": 1}, "tokenizer_class is 1, accepted: a string"),
        ("tokenizer_config.json", {"chat_template": 1}, "chat_template is 1, accepted: a string, or a list"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "chat_template is .*accepted: a string, or a list"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, "added_tokens_decoder is"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["y"]}, "added_tokens_decoder is .*an object of token ids"),
        ("tokenizer_config.json", {"additional_special_tokens": [3]}, "additional_special_tokens is .*a list of tokens"),
        ("special_tokens_map.json", {"pad_token": ["a"]}, "pad_token is .*accepted: a string"),
        ("added_tokens.json", {"<a>": "320"}, "'<a>' is '320', accepted: a token id"),
        ("generation_config.json", {"eos_token_id": "1"}, "eos_token_id is '1', accepted: a token id or a list"),
        ("generation_config.json", {"eos_token_id": [1.5]}, "eos_token_id is"),
        ("generation_config.json", {"eos_token_id": -1}, "eos_token_id is"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id is"),
        ("generation_config.json", {"do_sample": "true"}, "do_sample is 'true', accepted: true or false"),
        ("generation_config.json", {"temperature": "hot"}, "temperature is 'hot', accepted: a number, 0 or more"),
        ("generation_config.json", {"temperature": float("nan")}, "temperature is nan"),
        ("generation_config.json", {"top_p": 0}, "top_p is 0, accepted: a number above 0"),
        ("generation_config.json", {"top_k": 1.5}, "top_k is 1.5, accepted: an integer"),
        ("generation_config.json", {"min_p": 2}, "min_p is"),
        ("generation_config.json", {"repetition_penalty": 0}, "repetition_penalty is"),
        ("generation_config.json", {"max_new_tokens": 0}, "max_new_tokens is"),
    ],
)
def test_wrong_values_are_refused_without_transformers(folder, file, content, message):
    edit_json(folder / file, **content)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(folder / file))}: {message}"):
        texts.check(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\xfd"])
def test_damaged_files_are_named(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file}: (not valid JSON|holds list|tokenizers .* cannot read it)"):
        texts.check(folder)


def test_null_counts_as_missing(folder):
    edit_json(folder / "tokenizer_config.json", unk_token=None, chat_template=None, add_bos_token=None)
    edit_json(folder / "generation_config.json", temperature=None, eos_token_id=None)
    texts.check(folder)
    assert (baked(folder).templates, baked(folder).sampling) == ({}, {})


def test_what_does_not_fit_together_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"config.json: eos_token_id is -1, accepted"):
        baked(folder, eos_token_id=-1)
    with pytest.raises(CheckpointError, match=r"a prompt has token .* config.json says vocab_size 50"):
        baked(folder, vocab_size=50)
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"400": dict(ADDED, content="<x>", special=True)})
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: token '<x>' has id 400, but comes out as 320"):
        baked(folder)
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=..., bos_token=...)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: add_bos_token is true, but bos_token is missing"):
        baked(folder)
    edit_json(folder / "tokenizer_config.json", bos_token="", eos_token="")
    with pytest.raises(CheckpointError, match="add_bos_token is true, but bos_token is missing"):
        baked(folder)
    edit_json(folder / "tokenizer_config.json", padding_side="up", bos_token="<bos>")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: transformers .* makes no tokenizer of it.*Padding side"):
        baked(folder)


def test_a_damaged_sentencepiece_model_is_named(tmp_path):
    (save_sentencepiece(tmp_path) / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"tokenizer.model: sentencepiece cannot read it"):
        baked(tmp_path)


def test_every_file_that_says_something_is_in_the_digest(tmp_path):
    checkpoints.write(tmp_path / "c", num_hidden_layers=2)
    save_sentencepiece(tmp_path / "c")
    seen = set()
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                 "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
                 "additional_chat_templates/tool_use.jinja"):  # fmt: skip
        file = tmp_path / "c" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"changed": name}))
        seen.add(Checkpoint(tmp_path / "c").tokenizer_digest())
    assert len(seen) == 10
