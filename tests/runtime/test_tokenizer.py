"""The bundle's tokenizer against transformers' AutoTokenizer, and what happens without one or with a broken one."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from latentrt.runtime import tokenizer as runtime_tokenizer
from latentrt.runtime.errors import BundleError, RequestError
from latentrt.runtime.tokenizer import Tokenizer
from tests.conftest import EXAMPLE, save_tokenizer

HF = AutoTokenizer.from_pretrained(EXAMPLE)
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001


def files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files of a checkpoint."""
    return {f.name: f for f in folder.iterdir() if f.suffix in (".json", ".jinja")}


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer(str(folder), files(folder))


def eos_ids(folder: Path, tokenizer: Tokenizer | None, config: dict = {}) -> frozenset[int]:
    return runtime_tokenizer.eos_ids(str(folder), files(folder), config, tokenizer)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tokenizer(tmp_path)


def with_config(folder: Path, **changes):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return tokenizer_of(folder)


OURS = tokenizer_of(EXAMPLE)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_encode_and_decode_equal_transformers(text):
    assert OURS.encode(text) == HF.encode(text)
    assert OURS.encode(text, special=False) == HF.encode(text, add_special_tokens=False)
    ids = HF.encode(text)
    assert OURS.decode(ids) == HF.decode(ids, skip_special_tokens=True)
    assert OURS.decode(ids, skip_special=False) == HF.decode(ids)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=20)), min_size=1, max_size=5))
def test_chats_equal_transformers(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    for prompt in (True, False):
        rendered = HF.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert OURS.render_chat(messages, prompt) == rendered
        ids = HF.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert OURS.encode_chat(messages, prompt) == list(ids)


def test_special_tokens_of_the_example():
    assert OURS.special_tokens["bos_token"] == BOS and OURS.special_tokens["eos_token"] == EOS
    assert (OURS.bos_id, OURS.eos_id, OURS.vocab_size) == (0, 1, len(HF))
    assert eos_ids(EXAMPLE, OURS) == {1}


def test_bos_follows_the_config_and_is_not_doubled(folder):
    plain = with_config(folder).encode("ab", special=False)
    assert with_config(folder, add_bos_token=True).encode("ab") == [0, *plain]
    assert with_config(folder, add_bos_token=True).encode("<bos>ab") == [0, *plain]
    assert with_config(folder, add_bos_token=False).encode("ab") == plain
    assert with_config(folder, add_bos_token=False).encode("<bos>ab") == [0, *plain]
    by_post_processor = with_config(folder, add_bos_token=...)
    assert by_post_processor.encode("ab") == [0, *plain] == by_post_processor.encode("<bos>ab")
    assert with_config(folder, add_bos_token=True).encode("") == [0]


def test_truncation_and_padding_of_the_file_are_off(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
                          "pad_type_id": 0, "pad_token": "<eos>"}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(with_config(folder).encode("0123456789", special=False)) == 10


def test_special_tokens_as_objects_and_in_the_old_map(folder):
    as_object = with_config(folder, bos_token={"__type": "AddedToken", "content": "<bos>"})
    assert as_object.bos_id == 0
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    assert with_config(folder, eos_token=...).eos_id == 1


@pytest.mark.parametrize(("value", "expected"), [(5, {5}), ([5, 7], {5, 7}), (None, {1}), (..., {1})])
def test_eos_ids_come_from_the_generation_config_first(folder, value, expected):
    content = {} if value is ... else {"eos_token_id": value}
    (folder / "generation_config.json").write_text(json.dumps(content))
    assert eos_ids(folder, tokenizer_of(folder)) == expected


def test_eos_ids_come_from_the_model_config_next(folder):
    (folder / "generation_config.json").write_text("{}")
    assert eos_ids(folder, tokenizer_of(folder), {"eos_token_id": [2, 3]}) == {2, 3}


@pytest.mark.parametrize("value", ["1", [1.5], -1, True])
def test_a_wrong_eos_is_refused(folder, value):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(BundleError, match="eos_token_id is"):
        eos_ids(folder, None)


def test_the_template_file_and_named_templates(folder):
    messages = [{"role": "user", "content": "x"}]
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert with_config(folder, chat_template=named).render_chat(messages) == "yes"
    (folder / "chat_template.jinja").write_text("{% generation %}file {{ messages[0]|tojson }}{% endgeneration %}")
    assert with_config(folder, chat_template="config").render_chat(messages) == 'file {"role": "user", "content": "x"}'


def test_templates_are_sandboxed_and_can_refuse(folder):
    messages = [{"role": "user", "content": "x"}]
    escapes = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ raise_exception('only system') }}",
        "{{ cycler.__init__.__globals__ }}", "{{ 1 // 0 }}", "{{ messages[0].content + 1 }}", "{{ range(10**9)|list }}",
        "{{ strftime_now.__globals__.datetime }}",
    ]  # fmt: skip
    for template in escapes:
        with pytest.raises(RequestError, match="the chat template refuses"):
            with_config(folder, chat_template=template).render_chat(messages)
    assert len(with_config(folder, chat_template="{{ strftime_now('%Y') }}").render_chat(messages)) == 4


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 5}]])
def test_wrong_messages_are_refused(messages):
    with pytest.raises(RequestError, match=r"the conversation is empty|accepted are objects"):
        OURS.render_chat(messages)


def test_broken_files_are_named(folder):
    with pytest.raises(BundleError, match="has no chat template"):
        with_config(folder, chat_template=...).render_chat([{"role": "user", "content": "x"}])
    with pytest.raises(BundleError, match="does not parse"):
        with_config(folder, chat_template="{% if %}").render_chat([{"role": "user", "content": "x"}])
    with pytest.raises(BundleError, match=r"bos_token '<nope>' of tokenizer_config.json is not in tokenizer.json"):
        with_config(folder, bos_token="<nope>")
    with pytest.raises(BundleError, match="add_bos_token is set"):
        with_config(folder, bos_token=...)
    for content, message in (("{", "not valid JSON"), ("[]", "holds list")):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(BundleError, match=f"tokenizer_config.json.*{message}"):
            tokenizer_of(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"\(tokenizer.json\): tokenizers .* cannot read it"):
        tokenizer_of(folder)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(RequestError, match="not valid Unicode"):
        OURS.encode("a\ud800b")
