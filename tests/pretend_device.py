"""A pretend accelerator: torch's spare device type, whose tensors keep their data in host memory.

Inside `with PretendDevice() as device:` whatever is asked for on `DEVICE` is there. An operator computes on the host
what a GPU would compute, so the bits are those of plain torch on the CPU, and as on a GPU

- no operator takes tensors of both sides, but for numbers (CPU tensors without dimensions) and copies;
- memory cannot be looked into;
- whatever makes the host wait for a result is counted, and whatever copies something to the device, by line.

Knows no engine. Where a line of the product does what a GPU could not do, `Impossible` names it.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import cuda_ext
import ssd_runtime
from cuda_ext import fallbacks, reference

PRODUCT = [Path(package.__file__ or "").parent for package in (ssd_runtime, cuda_ext)]
# A line there says nothing, its caller does.
PASSING_ON = [
    "cuda_ext/compiled.py",
]

# Those of the product's operators that have CUDA kernels where the library was built with nvcc.
_REGISTERED = (PRODUCT[1] / "csrc" / "cuda" / "operators.cpp").read_text()
CUDA_KERNELS = frozenset(re.findall(r'm\.impl\("(\w+)"', _REGISTERED))


class Impossible(BaseException):
    """No GPU does that. Not an `Exception`: these an engine contains, and of a draft's no token would tell."""


class _Backend:
    """What `torch.pretend` has to offer so that seeding torch goes on without a warning."""

    def is_available(self) -> bool:
        return False

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


_setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
DEVICE = torch.device("pretend", 0)


@dataclass
class Tally:
    """What happened between host and device, by line of the product.

    Attributes:
        reads: of results, each of which the host waits for: single numbers, copies, shapes that depend on data.
        uploads: copies to the device.
    """

    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)

    def table(self) -> str:
        """For people: every line with its counts."""
        lines = sorted({*self.reads, *self.uploads})
        return "\n".join(f"{self.reads[line]:4d} reads {self.uploads[line]:4d} uploads  {line}" for line in lines)


class PretendTensor(Tensor):
    """A tensor on `DEVICE`.

    Attributes:
        held: its data. Views hold views of the same memory.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        with torch.inference_mode(False):
            made: PretendTensor = Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=DEVICE,
            )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise Impossible(f"{_line()}: {func} on {DEVICE} outside of `with PretendDevice()`")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch does the same, but refuses subclasses

    def numpy(self, *, force: bool = False) -> NoReturn:
        raise Impossible(f"{_line()}: NumPy cannot look into the memory of {DEVICE}")

    __array__ = numpy  # type: ignore[assignment]

    def data_ptr(self) -> NoReturn:
        raise Impossible(f"{_line()}: the host cannot look into the memory of {DEVICE}")


class PretendDevice(TorchDispatchMode):
    """The device while it is there, in one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._tallies = [Tally()]
        self._lifts: list[bool] = []

    def __enter__(self) -> PretendDevice:
        self._lifts.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=DEVICE)` is made on the host, then copied
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch._C._set_only_lift_cpu_tensors(self._lifts.pop())

    @contextlib.contextmanager
    def tallied(self) -> Iterator[Tally]:
        """Counts what happens inside, but for what is tallied apart in there."""
        self._tallies.append(Tally())
        try:
            yield self._tallies[-1]
        finally:
            self._tallies.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # as it is done everywhere but in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        tensors: list[Tensor] = []
        _each_tensor(tensors.append, (args, list(kwargs.values())))
        held = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, PretendTensor)}
        asked = kwargs.get("device")
        there = bool(held) if asked is None else torch.device(asked).type == DEVICE.type
        if not held and not there:
            return func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name not in ("_to_copy", "copy_") and held:
            self._refuse_mixture(func, tensors)
        if func.namespace == "ssd_runtime" and name not in CUDA_KERNELS:
            with self:
                return _without_kernel(name)(*args, **kwargs)
        self._count(func, name, args, there)
        kwargs = {key: _each_tensor(_held, value) for key, value in kwargs.items()}
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        found = func(*_each_tensor(_held, args), **kwargs)
        if not there:
            return found
        # What was changed in place is the tensor that it was.
        return _each_tensor(lambda one: held[id(one)] if id(one) in held else PretendTensor(one), found)

    def _refuse_mixture(self, func: Any, tensors: list[Tensor]) -> None:
        on_host = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
        written = tensors[0] if func._schema.is_mutable else None
        strangers = [tensor for tensor in on_host if tensor.dim() > 0 or tensor is written]
        if strangers:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in strangers)
            raise Impossible(f"{_line()}: {func} takes tensors of {DEVICE}, and of the CPU those of shape {shapes}")

    def _count(self, func: Any, name: str, args: Any, there: bool) -> None:
        if name in ("_to_copy", "copy_"):
            source, to_device = (args[1], isinstance(args[0], PretendTensor)) if name == "copy_" else (args[0], there)
            if isinstance(source, PretendTensor) != to_device:
                (self._tallies[-1].uploads if to_device else self._tallies[-1].reads)[_line()] += 1
        elif _waits(func, name, args):
            self._tallies[-1].reads[_line()] += 1


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether torch says it in terms of other operators, on every device."""
    composite: bool = func._can_decompose()
    return composite


def _each_tensor(change: Callable[[Any], Any], arguments: Any) -> Any:
    """The arguments, or results, of an operator with every tensor changed. (torch's pytree takes ten times as long.)"""
    if isinstance(arguments, Tensor):
        return change(arguments)
    if isinstance(arguments, list):
        return [_each_tensor(change, argument) for argument in arguments]
    if isinstance(arguments, tuple):
        return tuple([_each_tensor(change, argument) for argument in arguments])
    return arguments


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, PretendTensor) else tensor


def _waits(func: Any, name: str, args: Any) -> bool:
    """Whether the host has to know what is in the tensors: a number, or how large the result is."""
    if name in ("index", "index_put", "index_put_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    told = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return name == "raise_faults" or not told.isdisjoint(func.tags)


def _without_kernel(name: str) -> Callable[..., Any]:
    """What serves an operator of the product on a GPU for which it has no kernel; see `fallbacks.register`."""
    serving: Callable[..., Any] = fallbacks.rope_write_ if name == "rope_write_" else getattr(reference, name)
    return serving


def _line() -> str:
    """The innermost line of the product that is being executed."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if file := _product_file(frame.f_code.co_filename):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the product"


@functools.cache
def _product_file(name: str) -> str:
    """The path inside the repository, "" for files of others and for those that only pass calls on."""
    path = Path(name)
    if not any(package in path.parents for package in PRODUCT):
        return ""
    file = str(path.relative_to(PRODUCT[0].parent))
    return "" if file in PASSING_ON else file
