"""Templates: columns are variables, and what would spoil a prompt is an error."""

from __future__ import annotations

from typing import Any

import pytest

from hpcserve.batch.inputs.rows import RowError
from hpcserve.batch.templates import Template
from hpcserve.errors import ConfigError


def render(source: str, /, **columns: Any) -> str:
    return Template(source, "template").render(columns)


def row_error(source: str, columns: dict[str, Any]) -> str:
    with pytest.raises(RowError) as error:
        Template(source, "template").render(columns)
    return error.value.message


@pytest.mark.parametrize(
    ("source", "columns", "text"),
    [
        ("{{ a }} & <{{ b.c[0] }}>\n", {"a": "x", "b": {"c": [1]}}, "x & <1>"),
        ("{{ row['User question'] }}", {"User question": "Why?"}, "Why?"),
        ("{{ row }}", {"row": 7}, "7"),
        ("{{ a | tojson }}", {"a": {"b": "<é> & 'x'"}}, """{"b": "<é> & 'x'"}"""),
        ("{% for x in a %}{{ loop.index }}. {{ x }}\n{% endfor %}end", {"a": ["p", "q"]}, "1. p\n2. q\nend"),
        ("{{ a | default('none') }}", {}, "none"),
        ("{{ a or '' }}{% if b is none %}no b{% endif %}", {"a": None, "b": None}, "no b"),
        ("{{ false }} {{ 0 }} {{ a }}", {"a": ""}, "False 0 "),
        ("{{ range(3) | list }}", {}, "[0, 1, 2]"),
    ],
)
def test_columns_are_variables(source: str, columns: dict[str, Any], text: str) -> None:
    assert render(source, **columns) == text


@pytest.mark.parametrize(
    ("source", "columns", "message"),
    [
        (
            "{{ questoin }}",
            {"question": "a", "x": "b"},
            "template: 'questoin' is undefined; did you mean 'question'?",
        ),
        ("{{ zz }}", {"a": 1, "b": 2}, "template: 'zz' is undefined; the row has: a, b"),
        ("{% if zz %}{% endif %}", {"a": 1}, "template: 'zz' is undefined; the row has: a"),
        ("{{ zz.b | default('') }}{{ a.b }}", {"a": {}}, "template: 'zz' is undefined; the row has: a"),
        ("{{ row.b }}", {"a": 1}, "template: 'dict object' has no attribute 'b'"),
        (
            "{{ a }}{{ b }}",
            {"a": "x", "b": None, "c": None},
            "template: a null is printed; where a value may be missing, write {{ name or '' }}; "
            "null in this row: b",
        ),
        ("{{ a }}", {"a": b"\x89PNG"}, "template: binary data is printed"),
        ("{{ 1 / a }}", {"a": 0}, "template: ZeroDivisionError: division by zero"),
        (
            "{{ a.__class__.__mro__ }}",
            {"a": ""},
            "template: SecurityError: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        (
            "{% for x in range(10 ** 9) %}{% endfor %}",
            {},
            "template: OverflowError: Range too big. "
            "The sandbox blocks ranges larger than MAX_RANGE (100000).",
        ),
        (
            "{{ a.append(1) }}",
            {"a": []},
            "template: SecurityError: access to attribute 'append' of 'list' object is unsafe.",
        ),
    ],
)
def test_what_would_spoil_a_prompt_is_an_error_of_the_row(
    source: str, columns: dict[str, Any], message: str
) -> None:
    assert row_error(source, columns) == message


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        (
            "a\n{{ b",
            "template, line 2: unexpected end of template, expected 'end of print statement'.",
            "Correct the Jinja2 template.",
        ),
        (
            "a\n{% wrong %}",
            "template, line 2: Encountered unknown tag 'wrong'.",
            "Correct the Jinja2 template.",
        ),
        (
            "{{ a | nofilter }}",
            "template, line 1: No filter named 'nofilter'.",
            "Correct the Jinja2 template.",
        ),
        *(
            (
                source,
                f"template, line {line}: templates can't load other templates",
                "Write the text into this one.",
            )
            for source, line in [
                ("\n{% include 'x' %}", 2),
                ("{% import 'x' as y %}", 1),
                ("{% from 'x' import y %}", 1),
                ("{% extends 'x' %}", 1),
            ]
        ),
    ],
)
def test_a_template_that_can_not_work_is_told_before_any_row(source: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        Template(source, "template")
    assert (error.value.message, error.value.hint) == (message, hint)
