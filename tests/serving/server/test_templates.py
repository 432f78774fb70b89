"""Chat templates render as transformers renders them, from the same files, and refuse by name."""

import json

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from minilib.serving.server.templates import CannotRender, ChatTemplate, InvalidTemplate
from tests.serving.server.api import parts

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "Today is " + strftime_now("%Y") %}
{%- endif %}
<|header|>system<|/header|>

{{ system }}{{ eos_token }}
{% for message in messages %}
    {%- if message.name is defined %}{{ message | tojson }}{% endif %}
    {{ '<|header|>' + message['role'] + '<|/header|>\\n\\n' }}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}"""
INSTRUCTIONS = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate: user, assistant, …') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}
{% if loop.index0 > 20 %}{% break %}{% endif %}
{% endfor %}"""
SPACES = """{% set ns = namespace(count=0) %}
{% for m in messages if m.role != 'tool' %}
    {% set ns.count = ns.count + 1 %}
    {% if not loop.last %}{% continue %}{% endif %}
  {{ ns.count }}: {{ m.content.upper() }}
{% endfor %}{{ [1, {'a': 'ü<'}] | tojson(indent=2) }}"""
SAID = [{"role": "user", "content": " hi <b>ü</b> \n"}, {"role": "assistant", "content": "a\n\n b"}]
SYSTEM = [{"role": "system", "content": "be brief "}, *SAID, {"role": "user", "content": ""}]
CHATS = [SAID, [SAID[0]], SYSTEM, [{"role": "user", "content": "x", "name": "Ann"}]]


def theirs(source, chat, add_generation_prompt):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=parts()[1], bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = source
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("source", [CHATML, HEADERS, INSTRUCTIONS, SPACES])
@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("prompted", [False, True])
def test_renders_as_transformers_does(source, chat, prompted):
    ours = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    try:
        expected = theirs(source, CHATS[chat], prompted)
    except jinja2.TemplateError as error:
        with pytest.raises(CannotRender, match=str(error)):
            ours.render(CHATS[chat], prompted)
    else:
        assert ours.render(CHATS[chat], prompted) == expected


def test_the_oracle_refuses_and_renders():
    """Both branches above are taken."""
    with pytest.raises(jinja2.TemplateError, match="alternate"):
        theirs(INSTRUCTIONS, SYSTEM, True)
    assert "[INST] " in theirs(INSTRUCTIONS, SAID, True)


def write(folder, config=None, jinja=None):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return ChatTemplate.load(folder)


def test_where_templates_are(tmp_path):
    assert write(tmp_path) is None
    assert write(tmp_path, {"bos_token": "<s>"}) is None
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ bos_token }}|{{ eos_token }}"},
    ]
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "chat_template": named}
    assert write(tmp_path, config).render([]) == "<s>|</s>"
    assert write(tmp_path, config | {"chat_template": "plain"}).render([]) == "plain"
    assert write(tmp_path, config, "ü of its own{{ bos_token }}").render([]) == "ü of its own<s>"
    assert write(tmp_path, {"chat_template": named[:1]}, "x").render([]) == "x"


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% generation %}", "{% unknown %}"])
def test_no_template(source):
    with pytest.raises(InvalidTemplate, match="cannot be compiled"):
        ChatTemplate(source)


def test_a_template_that_is_no_text(tmp_path):
    with pytest.raises(InvalidTemplate, match="got int"):
        write(tmp_path, {"chat_template": 3})


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ range(999999999) | list }}",
        "{{ messages[7].content.strip() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ undefined_thing.x }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_what_a_template_may_not_do(source):
    with pytest.raises(CannotRender):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
