"""The options of `ssd generate` and `ssd bench` that say how tokens are chosen, in the names of SamplingParams."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import click

from ssd_runtime.speculation.types import SamplingParams


class Number(click.FloatRange):
    """A finite number in a range; click lets nan through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class TokenIds(click.ParamType):
    """Token ids with commas between them."""

    name = "ID,ID,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value if isinstance(value, tuple) else value.split(",")
        if not all(str(part).strip().isdecimal() for part in parts):
            self.fail(f"{value!r}: expected token ids with commas between them, as in 11,42", param, ctx)
        return tuple(int(part) for part in parts)


class TokenBias(click.ParamType):
    """TOKEN=BIAS: a token id and what is added to its logit."""

    name = "TOKEN=BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, equals, bias = value.partition("=")
        try:
            pair = int(token), float(bias)
        except ValueError:
            pair = -1, math.nan
        if not equals or pair[0] < 0 or not -100.0 <= pair[1] <= 100.0:
            self.fail(f"{value!r}: expected a token id and a bias from -100 to 100, as in 11=-5.5", param, ctx)
        return pair


_NUMBERS: dict[str, tuple[click.ParamType, str | None]] = {
    "temperature": (Number(min=0), "0 is greedy."),
    "top_k": (click.IntRange(min=0), "0 keeps all tokens."),
    "top_p": (Number(0, 1, min_open=True), None),
    "min_p": (Number(0, 1), None),
    "seed": (click.IntRange(0, 2**63 - 1), None),
    "repetition_penalty": (
        Number(min=0, min_open=True),
        "Divides (multiplies, if negative) the logits of tokens of prompt and answer.",
    ),
    "presence_penalty": (Number(-2, 2), "Taken from the logits of tokens of the answer."),
    "frequency_penalty": (Number(-2, 2), "The same for each time they are there."),
    "min_tokens": (click.IntRange(min=0), "No end token before so many."),
}
_OPTIONS = (
    *(
        click.option(f"--{name.replace('_', '-')}", type=kind, default=default, show_default=True, help=text)
        for name, (kind, text) in _NUMBERS.items()
        for default in [getattr(SamplingParams, name)]
    ),
    click.option("--logit-bias", type=TokenBias(), multiple=True, help="Add to a token's logit; may be repeated."),
    click.option("--allowed-tokens", type=TokenIds(), help="Choose among these only."),
    click.option("--banned-tokens", type=TokenIds(), default=(), help="Never choose these."),
)


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command that has --max-tokens too; it gets them together, as `params`."""
    names = [spec.name for spec in dataclasses.fields(SamplingParams)]

    @functools.wraps(function)
    def command(max_tokens: int, **options: Any) -> Any:
        params = sampling_params({name: options.pop(name) for name in names}, max_tokens)
        return function(max_tokens=max_tokens, params=params, **options)

    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def sampling_params(sampling: dict[str, Any], max_tokens: int) -> SamplingParams:
    """The parameters that these options ask for.

    Raises:
        UsageError: two of them cannot both hold, as can be told without a model.
    """
    params = SamplingParams(**sampling)
    biased = [token for token, _ in params.logit_bias]
    for token in biased:
        if biased.count(token) > 1:
            raise click.UsageError(f"--logit-bias names token {token} twice")
    if params.min_tokens > max_tokens:
        raise click.UsageError(f"--min-tokens {params.min_tokens} is above --max-tokens {max_tokens}")
    return params
