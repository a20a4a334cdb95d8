"""The baked tokenizer against transformers' AutoTokenizer: ids, decoding, chat templates; and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from latentrt.runtime.errors import BundleError, RequestError
from latentrt.runtime.tokenizer import Tokenizer
from tests.conftest import EXAMPLE, save_tokenizer
from tests.texts import edit_json, tokenizer_of

HF = AutoTokenizer.from_pretrained(EXAMPLE)
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER = [{"role": "user", "content": "x"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a + b <&>", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "ü": {"type": "number"}}, "required": ["a"]}}}]  # fmt: skip
WITH_TOOLS = """{{ bos_token }}
{%- if tools %}{{ '## Tools' }}
{% for tool in tools %}
    {{ tool | tojson(indent=2) }}
{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{{ message.content | trim }}{% continue %}{% endif %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}
    {%- elif message.content is string %}[{{ message.role }}]{{ message.content }}
    {%- else %}{% for part in message.content %}{{ part.text if part.type == 'text' else '?' }}{% endfor %}
    {%- endif %}
    {%- if message.role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tokenizer(tmp_path)


def with_config(folder: Path, **changes) -> Tokenizer:
    return tokenizer_of(edit_json(folder / "tokenizer_config.json", **changes))


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
        assert OURS.render_chat(messages, add_generation_prompt=prompt) == rendered
        ids = HF.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert OURS.encode_chat(messages, add_generation_prompt=prompt) == list(ids)


ADD = {"type": "function", "function": {"name": "add", "arguments": {"ü": 1.5}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [ADD]}
CONVERSATIONS = [
    USER,
    [{"role": "system", "content": "  Be <brief> & good.\n"}, *USER, {"role": "assistant", "content": "y"}, *USER],
    [*USER, CALL, {"role": "tool", "content": "3", "name": None}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [], TOOLS])
@pytest.mark.parametrize("name", [None, "default", "tool_use"])
def test_templates_with_tools_equal_transformers(folder, messages, tools, name):
    named = [{"name": "default", "template": "plain" + WITH_TOOLS}, {"name": "tool_use", "template": WITH_TOOLS}]
    ours, reference = with_config(folder, chat_template=named), AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(
        messages, tools=tools, chat_template=name, tokenize=False, add_generation_prompt=True
    )
    assert ours.render_chat(messages, tools, name) == expected
    assert ours.encode(expected, special=False) == ours.encode_chat(messages, tools, name)


def test_the_template_is_chosen_by_name(folder):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    ours = with_config(folder, chat_template=named)
    rendered = [ours.render_chat(USER), ours.render_chat(USER, TOOLS), ours.render_chat(USER, template="tool_use")]
    assert rendered == ["yes", "no", "no"]
    with pytest.raises(BundleError, match="has no chat template 'rag', only default, tool_use"):
        ours.render_chat(USER, template="rag")
    with pytest.raises(BundleError, match="has no chat template 'default', only tool_use"):
        with_config(folder, chat_template=named[:1]).render_chat(USER)
    (folder / "chat_template.jinja").write_text("{% generation %}file {{ messages[0]|tojson }}{% endgeneration %}")
    assert with_config(folder).render_chat(USER) == 'file {"role": "user", "content": "x"}'


def test_templates_that_ask_for_null_get_it(folder):
    """As DeepSeek-V2.5's and later ones do, which transformers 5 refuses to render."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}{{ m['tool_calls'][0]['type'] }};"
        "{% else %}{{ m['role'] + ': ' + m['content'] }};{% endif %}{% endfor %}"
    )
    assert with_config(folder, chat_template=template).render_chat([*USER, CALL]) == "user: x;function;"


def test_special_tokens_of_the_example():
    assert OURS.special_tokens["bos_token"] == BOS and OURS.special_tokens["eos_token"] == EOS
    assert (OURS.bos_id, OURS.vocab_size) == (0, len(HF))
    assert OURS.hidden_tokens == {0: BOS, 1: EOS}


def test_bos_follows_the_config_and_is_not_doubled(folder):
    plain = with_config(folder).encode("ab", special=False)
    assert with_config(folder, add_bos_token=True).encode("ab") == [0, *plain]
    assert with_config(folder, add_bos_token=True).encode("<bos>ab") == [0, *plain]
    assert with_config(folder, add_bos_token=False).encode("ab") == plain
    assert with_config(folder, add_bos_token=False).encode("<bos>ab") == [0, *plain]
    by_post_processor = with_config(folder, add_bos_token=...)
    assert by_post_processor.encode("ab") == [0, *plain] == by_post_processor.encode("<bos>ab")
    assert with_config(folder, add_bos_token=True).encode("") == [0]
    edit_json(folder / "tokenizer.json", post_processor=None)
    assert with_config(folder, add_bos_token=True).encode("ab") == [0, *plain]
    assert with_config(folder, add_bos_token=...).encode("ab") == plain


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
    assert with_config(folder, eos_token=...).special_tokens["eos_token"] == "<eos>"


def test_templates_are_sandboxed_and_can_refuse(folder):
    escapes = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ raise_exception('only system') }}",
        "{{ cycler.__init__.__globals__ }}", "{{ 1 // 0 }}", "{{ messages[0].content + 1 }}", "{{ range(10**9)|list }}",
        "{{ strftime_now.__globals__.datetime }}",
    ]  # fmt: skip
    for template in escapes:
        with pytest.raises(RequestError, match="the chat template refuses"):
            with_config(folder, chat_template=template).render_chat(USER)
    assert len(with_config(folder, chat_template="{{ strftime_now('%Y') }}").render_chat(USER)) == 4


@pytest.mark.parametrize(
    "messages",
    [[], ["x"], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 5}], [{"role": "user", "content": None}],
     [{"role": "user", "content": "x", "file": Path("x")}]],
)  # fmt: skip
def test_wrong_messages_are_refused(messages):
    with pytest.raises(RequestError, match=r"the conversation is empty|accepted (are objects|as `content`|is plain data)"):
        OURS.render_chat(messages)


def test_broken_templates_and_files_are_named(folder):
    with pytest.raises(BundleError, match="has no chat template"):
        with_config(folder, chat_template=...).render_chat(USER)
    with pytest.raises(BundleError, match="does not parse"):
        with_config(folder, chat_template="{% if %}").render_chat(USER)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer.json: tokenizers .* cannot read it"):
        Tokenizer("bundle", folder / "tokenizer.json", {}, {})


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(RequestError, match="not valid Unicode"):
        OURS.encode("a\ud800b")
