"""A look at every operator that torch runs inside a `with`. Knows no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorWatch(TorchDispatchMode):
    """Shows `watched` each operator that has run.

    Operators made of others are taken apart, since these make tensors too (`einsum`); under `torch.inference_mode` they
    would come whole.
    """

    def watched(self, func: Any, given: object, result: object) -> None:
        """An operator, its positional and named arguments, what it returned."""
        raise NotImplementedError

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        self.watched(func, (args, kwargs), result)
        return result
