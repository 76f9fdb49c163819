"""Chat templates render as transformers renders them, and can do nothing else."""

import copy
from datetime import datetime
from time import monotonic
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composeformer.errors import InputError, MissingExtra
from composeformer.text import budget, render_chat, sandbox

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML = """
{%- set loop_messages = messages -%}
{%- for message in loop_messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.role == 'assistant' %}
        {% generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' ~ call.function.name ~ '", "parameters": ' }}
            {{- call.function.arguments | tojson ~ '}' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0, seen=[]) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- set ns.seen = ns.seen + [message.role] %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.content is not string %}{%- continue %}{%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
{{ ns.seen|join(",") }} {{ messages|map(attribute="role")|unique|list }} {{ "%s of %d"|format("x", 3) }}
"""

TEMPLATES = {"smollm2": SMOLLM2, "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}


def say(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)
    ]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


CONVERSATIONS = [
    say("Hi"),
    say("What is 2 < 3 & 'x'?", "  True.  ", "Why?\n\n"),
    say("日本 😀", "{{ no template }}", "<|im_end|>", system=" You are\nterse. "),
    say("", system=""),
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": 'é <&> "q"', "parameters": {"a": [1, None]}},
    }
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name: str) -> None:
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            for tools in (None, TOOLS):
                tokens = {"bos_token": "<s>", "eos_token": "</s>"}
                expected, _ = theirs.render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=TEMPLATES[name],
                    add_generation_prompt=prompt,
                    **tokens,
                )
                ours = render_chat(
                    messages,
                    TEMPLATES[name],
                    bos="<s>",
                    eos="</s>",
                    add_generation_prompt=prompt,
                    tools=tools,
                )
                assert ours == expected[0]


def render(template: str, messages: Any = None, **variables: Any) -> str:
    messages = say("Hi") if messages is None else messages
    return render_chat(messages, template, bos="<s>", eos=None, variables=variables)


@given(st.text())
def test_a_message_is_data_never_a_template(text: str) -> None:
    assert render("{{ messages[0].content }}", say(text)) == text


def test_names_that_templates_ask_for() -> None:
    assert render("{{ bos_token }}{{ eos_token is defined }}{{ tools }}{{ documents }}") == "<s>FalseNoneNone"
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


def test_blocks_leave_no_blank_lines() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_loops_can_be_left() -> None:
    assert render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"


def refusal(template: str, messages: Any = None) -> str:
    with pytest.raises(InputError) as caught:
        render(template, messages)
    message = str(caught.value)
    assert message.startswith("chat template")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("a\n{{ 1 +", "line 2: "),
        ("{{ raise_exception('roles\nmust alternate') }}", "roles must alternate"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{% include 'other' %}", "no loader"),
        ("{{" + "(" * 2000 + ")" * 2000 + "}}", "recursion"),
        ("x" * ((1 << 20) + 1), "at most"),
    ],
)
def test_a_faulty_template_is_one_line(template: str, expected: str) -> None:
    assert expected in refusal(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages|map(attribute='__class__')|list }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ messages.append('x') }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ messages.clear() }}",
        "{{ messages.sort() }}",
    ],
)
def test_reaching_out_or_changing_the_messages_is_refused(template: str) -> None:
    messages = say("Hi", "Hello")
    before = copy.deepcopy(messages)
    with pytest.raises(InputError, match=r"chat template: .*"):
        render(template, messages)
    assert messages == before


def grow(start: str, step: str) -> str:
    turn = f"{{% set n.s = {step} %}}"
    return f"{{% set n = namespace(s={start}) %}}{{% for i in range(60) %}}{turn}{{% endfor %}}"


BOMBS = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "range": "{{ range(10**9)|list }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "binary recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "output": "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "plain output": "{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}",
    "captured output": "{% set x %}{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}{% endset %}",
    "repetition": "{{ 'x' * 10**10 }}",
    "power": "{{ 10**(10**9) }}",
    "repeated list": "{{ ([0] * 10**9)|length }}",
    "doubling with +": grow("'x'", "n.s + n.s"),
    "doubling with ~": grow("'x'", "n.s ~ n.s"),
    "doubling a list": grow("[0]", "n.s + n.s"),
    "doubling by set": "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "nesting lists": grow("[0]", "[n.s, n.s]"),
    "nesting dicts": grow("0", "dict(a=n.s, b=n.s)"),
    "nesting namespaces": grow("0", "namespace(a=n.s, b=n.s)") + "{{ n.s }}",
    "growing number": grow("3", "n.s * n.s"),
    "center": "{{ 'x'|center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "indent": "{{ ('\\n' * 100000)|indent(100000) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "written width": "{{ '%999999999d' % 1 }}",
    "given width": "{{ '%*d' % (10**9, 1) }}",
    "width in braces": "{{ '{:999999999}'.format(1) }}",
    "nested width": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format filter": "{{ '%*d'|format(10**9, 1) }}",
    "join": "{% set x = 'x' * 8000000 %}{{ x.join(range(100000)|map('string')) }}",
    "replace": "{% set x = 'x' * 8000000 %}{{ x|replace('x', x) }}",
    "translate": "{{ ('x' * 8000000).translate({120: 'x' * 8000}) }}",
    "lazy items": "{{ range(100000)|map('string')|map('center', 4000000)|list|length }}",
    "json": "{{ messages|tojson(indent=10**9) }}",
    "lipsum": "{{ lipsum(10**6) }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_work_out_of_proportion_is_refused(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the same limits, smaller
    monkeypatch.setattr(budget, "MAX_TURNS", 20_000)
    refusal(BOMBS[bomb])


def test_time_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_SECONDS", -1.0)
    assert "seconds" in refusal("{% for i in range(3) %}{% endfor %}")


def test_a_long_conversation_is_within_the_budget() -> None:
    messages = say(*["word " * 200] * 1001)
    for template in TEMPLATES.values():
        start = monotonic()
        assert len(render(template.replace("eos_token", "bos_token"), messages)) > 1_000_000
        assert monotonic() - start < budget.MAX_SECONDS


def test_one_rendering_takes_nothing_from_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_TURNS", 60)
    for _ in range(3):
        assert render("{% for i in range(50) %}{% endfor %}ok") == "ok"


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda package: False)
    with pytest.raises(MissingExtra, match=r"jinja2: pip install 'composeformer\[text\]'"):
        render("")
