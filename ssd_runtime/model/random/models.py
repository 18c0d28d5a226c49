"""Models that need no file, by name: "random:llama-8b", "random:llama-1b@0.85". Knows no tensors and no torch.

Such a model has the published shape of a real one and random weights, so its forwards take the time of the real one.
What it says is scripted (script.py).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.architecture import Architecture, RopeScaling

PREFIX = "random:"
LABEL = "scripted text, random weights"
FIRST_WORD = 256  # of their vocabularies: ids below are bytes


@dataclass(frozen=True)
class Shape:
    """What `random:NAME` stands for.

    Attributes:
        draft: the name of the shape that drafts for it unless another is asked for; of the same vocabulary.
    """

    arch: Architecture
    draft: str


def _llama(
    layers: int, heads: int, head_dim: int, hidden: int, inner: int, factor: float, *, tied: bool
) -> Architecture:
    """Llama 3.1 and 3.2, by the config.json of each."""
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    sizes = layers, heads, 8, head_dim, hidden, inner
    return Architecture("llama", *sizes, 128256, 1e-5, 5e5, scaling, tied, max_position=131072)


def _qwen(layers: int, heads: int, hidden: int, inner: int, *, tied: bool) -> Architecture:
    """Qwen3, by the config.json of each."""
    sizes = layers, heads, 8, 128, hidden, inner
    return Architecture("qwen3", *sizes, 151936, 1e-6, 1e6, None, tied, qk_norm=True, max_position=40960)


def _smollm2(vocab_size: int, max_position: int) -> Architecture:
    """SmolLM2 135M, with its own vocabulary of 49152 tokens or another family's."""
    return Architecture("llama", 30, 9, 3, 64, 576, 1536, vocab_size, 1e-5, 1e5, None, True, max_position=max_position)


SHAPES = {
    "llama-1b": Shape(_llama(16, 32, 64, 2048, 8192, 32.0, tied=True), "llama-135m"),
    "llama-8b": Shape(_llama(32, 32, 128, 4096, 14336, 8.0, tied=False), "llama-1b"),
    "llama-70b": Shape(_llama(80, 64, 128, 8192, 28672, 8.0, tied=False), "llama-1b"),
    "qwen-0.6b": Shape(_qwen(28, 16, 1024, 3072, tied=True), "qwen-135m"),
    "qwen-32b": Shape(_qwen(64, 64, 5120, 25600, tied=False), "qwen-0.6b"),
    # No such models are published: a draft that CPU cores can run beside a large target.
    "llama-135m": Shape(_smollm2(128256, 131072), "llama-135m"),
    "qwen-135m": Shape(_smollm2(151936, 40960), "qwen-135m"),
    "smollm2-135m": Shape(_smollm2(49152, 8192), "smollm2-135m"),
    "tiny": Shape(Architecture("llama", 2, 4, 2, 16, 64, 128, 512, 1e-5, 1e4, max_position=8192), "tiny"),
}


@dataclass(frozen=True)
class RandomModel:
    """One of them, as it was asked for.

    Attributes:
        agreement: the share of positions at which its own first token is the script's.
    """

    path: str
    arch: Architecture
    agreement: float = 1.0


def random_model(path: str) -> RandomModel | None:
    """The model that `path` names; None where it is the path of a file or the name of another model.

    Raises:
        ConfigError: it begins with "random:" and goes on with what is not known.
    """
    if not path.startswith(PREFIX):
        return None
    name, at, agreement = path.removeprefix(PREFIX).partition("@")
    if name not in SHAPES:
        close = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"did you mean {PREFIX}{close[0]}?" if close else f"known: {', '.join(SHAPES)}"
        raise ConfigError(f"model {path}: no random model is called {name!r}; {hint}")
    try:
        share = float(agreement) if at else 1.0
    except ValueError:
        share = math.nan
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"model {path}: the agreement {agreement!r} is not a number from 0 to 1, as in 0.85")
    return RandomModel(path, SHAPES[name].arch, share)


def pair_overrides(text: str, agreement: float) -> tuple[str, str]:
    """The configuration keys that make an engine have such a target and draft.

    Args:
        text: "TARGET" or "TARGET,DRAFT", names of shapes.

    Raises:
        ConfigError: as `random_model`.
    """
    target, comma, draft = text.partition(",")
    random_model(PREFIX + target)
    draft = draft if comma else SHAPES[target].draft
    random_model(path := f"{PREFIX}{draft}@{agreement}")
    return f"target.model={PREFIX}{target}", f"draft.model={path}"


def label(target: str, draft: str) -> str | None:
    """What must be said beside every text and figure of an engine with these models; None of a real target."""
    if not target.startswith(PREFIX):
        return None
    return f"{LABEL}: target {target}" + (f", draft {draft}" if draft.startswith(PREFIX) else "")
