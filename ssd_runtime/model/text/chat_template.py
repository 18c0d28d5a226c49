"""A model's chat template: a conversation as the model was taught to read it. Knows no tokens and no files.

It is a program in Jinja, of whoever made the model, and runs in the leader between two rounds. So it is rendered as
transformers does (utils/chat_template_utils.py), in a sandbox, and whatever goes wrong in it, or takes too long or too
much, is the failure of that request.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ssd_runtime.errors import ConfigError, RequestError
from ssd_runtime.model.files.fields import brief_error

LONGEST_TEMPLATE = 1 << 18  # characters; known ones have a few tens of thousands, and this takes a second to compile
MOST_SECONDS = 1.0  # of processor time for one conversation, in which nobody else is served
MOST_MADE = 1 << 27  # characters of texts and items of lists that one conversation may make, intermediate ones too
_MOST_BITS = 1 << 12  # of a whole number
_GROWING = re.compile("batch|center|expandtabs|indent|join|ljust|lipsum|replace|rjust|slice|tojson|wordwrap|zfill")
_WIDE_FORMAT = re.compile(r"[%:][<>=^+\-# 0,]*\d{7}")


class ChatTemplate:
    """Renders conversations.

    Args:
        templates: source by name; "default" is the one for chats.
        special_tokens: text by name ("bos_token"), as the template sees them; what the model has not, is undefined.
        who: begins messages: "model PATH".
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], who: str) -> None:
        self._templates = templates
        self._special_tokens = special_tokens
        self._who = who

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation up to where the assistant answers.

        Raises:
            ConfigError: there is no template, or it does not parse.
            RequestError: no message; or the template refuses or fails on them, in time or in size too.
        """
        if not messages:
            raise RequestError("the conversation is empty: give at least one message")
        template = self._compiled
        if isinstance(template, str):
            raise ConfigError(f"{self._who} {template}; use a plain prompt")
        try:
            with self._environment.budget():
                return template.render(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    **self._special_tokens,
                )
        except Exception as error:  # noqa: BLE001 (a stranger's program may raise anything)
            reason = brief_error(error) or type(error).__name__
            raise RequestError(f"the model's chat template refuses these messages: {reason}") from None

    @functools.cached_property
    def _environment(self) -> _Environment:
        return _Environment()

    @functools.cached_property
    def _compiled(self) -> jinja2.Template | str:
        """Or what is wrong with it, which took as long to find out."""
        if not self._templates:
            return "has no chat template"
        if (source := self._templates.get("default")) is None:
            return f"has several chat templates ({', '.join(sorted(self._templates))}) and none named default"
        if len(source) > LONGEST_TEMPLATE:
            return f"has a chat template of more than {LONGEST_TEMPLATE} characters"
        try:
            with self._environment.budget():
                return self._environment.from_string(source)
        except Exception as error:  # noqa: BLE001 (Python, which it is compiled to, has errors of its own)
            return f"has a chat template that does not parse ({brief_error(error) or type(error).__name__})"


class _Environment(ImmutableSandboxedEnvironment):
    """What templates find, as in transformers, and their budget.

    Each turn of a loop and each call looks at the clock; what operators, calls, filters and blocks make is weighed.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters = {name: self._weighing(name, function) for name, function in self.filters.items()}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
        self._deadline = math.inf  # on the thread's clock
        self._made = 0

    @contextlib.contextmanager
    def budget(self) -> Iterator[None]:
        """Of one conversation."""
        self._deadline, self._made = time.thread_time() + MOST_SECONDS, 0
        try:
            yield
        finally:
            self._deadline = math.inf

    # -- hooks of Jinja ------------------------------------------------------------------------------------------

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Each call of a function, method or macro; and of `turn`."""
        if time.thread_time() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"it takes longer than {MOST_SECONDS:g} s")
        self._check_growth(getattr(obj, "__name__", ""), (getattr(obj, "__self__", None), *args, *kwargs.values()))
        return self._weigh(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, str | list | tuple):
                    self._check_room(len(value) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%":
            _check_format(left)
        return self._weigh(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Each look at a method; `format` of a text comes back in a sandbox of its own."""
        if (wrapped := super().wrap_str_format(value)) is not None:
            _check_format(value.__self__)
        return wrapped

    def concat(self, pieces: Iterable[str]) -> str:
        """What a template, a macro or a block has put out."""
        taken = []
        for piece in pieces:
            self._make(len(piece))
            taken.append(piece)
        return "".join(taken)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Hooked().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        assert isinstance(tree, nodes.Template)
        return tree

    # -- what `_Hooked` has templates call -----------------------------------------------------------------------

    def turn(self) -> bool:
        """One more turn of a loop."""
        return True

    @jinja2.pass_eval_context
    def joined(self, eval_context: EvalContext, *parts: Any) -> str:
        """a ~ b"""
        texts = [part if isinstance(part, str) else str(part) for part in parts]
        self._check_room(sum(map(len, texts)))
        return markup_join(texts) if eval_context.autoescape else str_join(texts)

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """value[start:stop:step]"""
        return value[start:stop:step]

    # -- the budget ----------------------------------------------------------------------------------------------

    def _weighing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def weighing(*args: Any, **kwargs: Any) -> Any:
            self._check_growth(name, (*args, *kwargs.values()))
            if name == "format":
                _check_format(args[0])
            return self._weigh(function(*args, **kwargs))

        return weighing

    def _check_growth(self, name: str, args: Sequence[Any]) -> None:
        """Before one of those that make much of little at once; about, and never too little."""
        if _GROWING.fullmatch(name):
            factors = [len(arg) if isinstance(arg, str | list | tuple) else arg for arg in args]
            factors = [factor for factor in factors if isinstance(factor, int)]
            if name == "replace":
                del factors[1:2]  # what is replaced
            self._check_room(math.prod(sorted(factors)[-2:]))

    def _weigh(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict):
            self._make(len(value))
        elif isinstance(value, int):
            _check_bits(value.bit_length())
        return value

    def _make(self, size: int) -> None:
        self._check_room(size)
        self._made += size

    def _check_room(self, size: int) -> None:
        if self._made + size > MOST_MADE:
            raise jinja2.TemplateRuntimeError("it makes too much text")


class _Hooked(NodeTransformer):
    """Has a template call its environment where Jinja has no hook: turns of loops, `~` and slices."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("turn", [], node.lineno), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("turn", [], node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(part := node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (part.start, part.stop, part.step)]
        return _call("sliced", [node.node, *bounds], node.lineno)


def _call(method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    """Of a method of the environment."""
    call = nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)
    call.set_lineno(line)
    return call


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks for training what the assistant says; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("content"), [], [], body)
        block.set_lineno(line)
        return block

    def content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(...)` without names that mean something to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args
        assert isinstance(self, _Namespace)
        Namespace.__init__(self)
        for name, value in dict(*values, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no names that begin with an underscore: {name!r}")
        super().__setitem__(name, value)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDE_FORMAT.search(text):
        raise jinja2.TemplateRuntimeError("format makes too much text")


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise jinja2.TemplateRuntimeError("a number is too large")
