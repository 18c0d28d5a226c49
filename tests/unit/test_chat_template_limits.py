"""Whatever goes wrong in a chat template, or takes too long or too much, is one line about its request or model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jinja2
import pytest

from ssd_runtime.errors import ConfigError, RequestError
from ssd_runtime.model.text import chat_template
from ssd_runtime.model.text.chat_template import ChatTemplate
from tests.chat_families import said


def render(template: str) -> str:
    return ChatTemplate({"default": template}, {}, "model m").render(said(("user", "hi")))


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loops that call themselves": "{% for a in [1] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
    "filters": "{% for a in range(99999) %}{% if range(99999) | sum %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_fails_the_request_in_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.05)
    began = time.thread_time()
    with pytest.raises(RequestError, match=r"refuses these messages: it takes longer than 0\.05 s"):
        render(ENDLESS[name])
    assert time.thread_time() - began < 1.0


HUGE = {
    "a product": "{{ 'x' * 99999999999 }}",
    "a product of lists": "{{ (99999999999 * [1]) | length }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "powers": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "sums": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "joined": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "formatted": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}"
    "{% endfor %}",
    "replaced": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('x', 'xx') %}"
    "{% endfor %}",
    "a method": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('x', 'xx') %}"
    "{% endfor %}",
    "a block": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% endfor %}",
    "a macro": "{% macro f(n) %}{% if n %}{% set x = f(n - 1) %}{{ x }}{{ x }}{% else %}x{% endif %}{% endmacro %}"
    "{{ f(99) }}",
    "output": "{% for i in range(99999) %}{% for j in range(9) %}" + 999 * "x" + "{% endfor %}{% endfor %}",
    "slices": "{% set x = 'x' * 9999999 %}{% set ns = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set ns.l = [ns.l, x[1:]] %}{% endfor %}",
    "a replacement": "{% set x = 'x' * 999999 %}{{ x.replace('x', x) }}",
    "a replacing filter": "{% set x = 'x' * 999999 %}{{ x | replace('x', x) }}",
    "a separator": "{{ range(99999) | list | join('x' * 99999) | length }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "a wide method": "{{ 'x'.center(99999999999) }}",
    "a wide filter": "{{ 'x' | indent(99999999999) }}",
    "a wide format": "{{ '{:>99999999999}'.format(1) }}",
    "a wide format filter": "{{ '%099999999999d' | format(1) }}",
    "a wide operator": "{{ '%99999999999d' % 1 }}",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_makes_too_much_fails_the_request_before_it_has(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MOST_MADE", 1 << 24)
    with pytest.raises(RequestError, match=r"makes? too much text|a number is too large"):
        render(HUGE[name])


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ messages[9].content.x }}",
        "{{ 1 + 'x' }}",
        "{{ 'x' | int('y', 99) | round(1, 'z') }}",
        "{{ {} | tojson(separators=1) }}",
        "{{ strftime_now(1) }}",
        "{{ {messages: 1} }}",
        "{{ raise_exception() }}",
        "{{ raise_exception('') }}",
        "{{ [1, 'a'] | sort }}",
        "{{ '' | first | list | batch(0) | list }}{{ [1] | batch(0, 1) | list }}{{ lipsum(n='x') }}",
        "{% include 'x' %}{% extends 'y' %}",
    ],
)
def test_any_failure_of_a_template_is_one_line_about_the_request(template: str) -> None:
    with pytest.raises(RequestError, match=r"^the model's chat template refuses these messages: .+$") as caught:
        render(template)
    assert "\n" not in str(caught.value)


def deep(opening: str, closing: str, depth: int) -> str:
    return "{{ " + opening * depth + "1" + closing * depth + " }}"


@pytest.mark.parametrize(
    "template",
    [
        deep("(", ")", 9999),
        deep("[", "]", 9999),
        "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ 1" + " + 1" * 60000 + " }}",
        "{{ x|" + "|".join(["trim"] * 9999) + " }}",
        "{{ 'x' | nosuch }}",
        "x" * (1 << 18) + "y",
    ],
    ids=lambda template: template[:20],
)
def test_any_template_that_does_not_compile_is_one_line_about_the_model(template: str) -> None:
    with pytest.raises((ConfigError, RequestError), match=r"^(the model's|model m has a) chat template ") as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_a_template_is_compiled_once_and_its_budget_is_each_conversations_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MOST_MADE", 99)
    compiled: list[str] = []
    compile_template: Callable[..., Any] = jinja2.Environment.compile
    monkeypatch.setattr(
        jinja2.Environment,
        "compile",
        lambda self, *given, **named: compiled.append("") or compile_template(self, *given, **named),
    )
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {}, "model m")
    for _ in range(5):
        assert template.render(said(("user", "x" * 60))) == "x" * 60
    with pytest.raises(RequestError):
        template.render(said(("user", "x" * 100)))
    assert len(compiled) == 1
