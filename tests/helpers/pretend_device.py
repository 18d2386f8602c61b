"""An accelerator that is not there: PyTorch's private backend under the name ``pretend``, whose memory is the host's.

Its tensors are plain ones (no subclass, no mode), with storages of their own, so that PyTorch's dispatcher, autograd
and transforms treat them as those of any accelerator. Every operation ends in one function here, which runs the CPU's
kernel on the same memory. What a real accelerator would refuse is refused (operations on tensors of two devices,
generators of another device, tensors as arrays of NumPy), and what makes the host wait for the device is noted by the
place in the packages that asked for it (:func:`watch`).

What cannot be seen here: whether kernels of a real device exist and agree (cuSOLVER, cuDNN, autocast), branches on
``type == "cuda"``, the order of streams, and backward passes in a thread of their own. A hook on a tensor that raises
while PyTorch back-propagates ends the process: PyTorch asks this device's guard for its stream while the error is set.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten

NAME = "pretend"
_HOST = torch.device("cpu")

WAITS = frozenset(
    {
        "_linalg_eigh", "_linalg_eigvals", "_linalg_svd", "_local_scalar_dense", "_unique", "_unique2", "bincount",
        "equal", "linalg_eig", "linalg_lstsq", "masked_select", "nonzero", "unique_consecutive", "unique_dim",
    }
)  # fmt: skip
"""Operations whose kernels on a CUDA device wait for a result: a number, the size of the output, a check for errors."""

SCALARS_OF_THE_HOST = frozenset({"_index_put_impl_", "fill", "fill_", "masked_fill", "masked_fill_"})
"""Beside point-wise operations and ``_foreach_*``, what takes a CPU tensor without dimensions for a number."""

INDEXED = frozenset({"index", "_index_put_impl_"})
"""What moves its indices to the device, and waits for the number of those that are true."""


@dataclass
class Traffic:
    """What went between host and device.

    Attributes:
        reads: By place, ``"room/file.py:function"``: the host waits for what the device computes.
        copies: By place: the device waits for what the host sends, and the host until it is there.
    """

    reads: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)


_watching: list[Traffic] = []
_generator = torch.Generator()  # of torch.rand(…, device="pretend")
_generators: set[int] = set()  # by address, those of the device


@contextmanager
def watch() -> Iterator[Traffic]:
    """Note what goes between host and device in the context."""
    traffic = Traffic()
    _watching.append(traffic)
    try:
        yield traffic
    finally:
        _watching.remove(traffic)


PACKAGES = tuple(str(Path(__file__).parents[2] / name) + "/" for name in ("hessopt", "diagnostics"))


def _place() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGES) and not frame.f_code.co_name.startswith("<"):  # of what a comprehension is in
            return f"{name[len(str(Path(__file__).parents[2])) + 1 :]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "caller"


def _note(kind: str) -> None:
    if _watching:
        place = _place()
        for traffic in _watching:
            getattr(traffic, kind)[place] += 1


# --- memory -----------------------------------------------------------------------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
        ("size", ctypes.c_int64), ("stride", ctypes.c_int64),  # ours: where shape and strides point to
    )  # fmt: skip


_c = ctypes.CDLL(None)
_c.malloc.restype, _c.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_FREE = ctypes.cast(_c.free, ctypes.c_void_p).value
_HEADER, _ALIGNED, _EXTENSION, _UNSIGNED = 128, 64, 12, 1
assert ctypes.sizeof(_DLTensor) <= _HEADER


def _bytes(count: int) -> Tensor:
    """New memory of the device: a block of the C library with DLPack's description at its front, freed with it."""
    block = _c.malloc(_HEADER + count + _ALIGNED)
    d = _DLTensor.from_address(block)
    d.data = -(-(block + _HEADER) // _ALIGNED) * _ALIGNED
    d.device_type, d.device_id, d.ndim, d.byte_offset = _EXTENSION, 0, 1, 0
    d.code, d.bits, d.lanes = _UNSIGNED, 8, 1
    d.size, d.stride = count, 1
    d.shape, d.strides = block + _DLTensor.size.offset, block + _DLTensor.stride.offset
    d.context, d.deleter = None, _FREE
    return torch._C._from_dlpack(_capsule(block, b"dltensor", None))


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    count = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
    return aten.as_strided_(aten.view.dtype(_bytes(count * dtype.itemsize), dtype), size, stride, 0)


def _on_host(t: Tensor) -> Tensor:
    """The same memory as a CPU tensor. Not to outlive the tensor."""
    storage = t.untyped_storage()
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _HOST, storage.nbytes())
    return torch.empty(0, dtype=t.dtype).set_(same, t.storage_offset(), t.shape, t.stride())


def _to_device(t: Tensor) -> Tensor:
    """A copy in memory of the device."""
    dense = torch.empty_like(t)  # keeps the strides of what is dense
    found = _empty(dense.shape, dense.stride(), t.dtype)
    _on_host(found).copy_(t)
    return found


def _view(t: Tensor, size: Any, stride: Any, offset: int | None = None) -> Tensor:
    found = aten.alias(t)
    return aten.as_strided_(found, size, stride, t.storage_offset() if offset is None else offset)


def _pretends(t: Any) -> bool:
    return isinstance(t, Tensor) and t.device.type == NAME


# --- operations -------------------------------------------------------------------------------------------------------


class _Schema(NamedTuple):
    name: str
    arguments: list[str]
    tensors: set[str]
    written: list[str]
    outputs: set[str]
    returns: list[bool]
    seeded: bool
    waits: bool
    of_host: bool
    takes_scalars: bool


@cache
def _schema_of(op: Any) -> _Schema:
    arguments, returns = op._schema.arguments, op._schema.returns
    name = op.overloadpacket.__name__
    return _Schema(
        name,
        [a.name for a in arguments],
        {a.name for a in arguments if str(a.type) in ("Tensor", "Optional[Tensor]")},
        [a.name for a in arguments if _is_write(a)],
        {a.name for a in arguments if _is_write(a) and a.kwarg_only},
        [_is_write(r) for r in returns],
        torch.Tag.nondeterministic_seeded in op.tags,
        name in WAITS,
        any(
            torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), k)
            for k in (
                "CPU",
                "CompositeExplicitAutograd",
                "CompositeImplicitAutograd",
                "CompositeExplicitAutogradNonFunctional",
            )
        ),
        torch.Tag.pointwise in op.tags or name.startswith("_foreach_") or name in SCALARS_OF_THE_HOST,
    )


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation without a rule below: the CPU's kernel on the same memory."""
    schema = _schema_of(op)
    values = dict(zip(schema.arguments, args, strict=False)) | kwargs
    if schema.waits:
        _note("reads")
    if not schema.of_host:
        pytest.skip(f"{op} is a kernel of accelerators alone")
    known: dict[int, Tensor] = {}  # tensors of the device, by the storage that stands for theirs
    replaced: list[tuple[Tensor, Tensor]] = []
    outputs: list[tuple[Tensor, Tensor]] = []
    strangers: list[tuple[str, Tensor]] = []

    def on_host(key: str, v: Any) -> Any:
        if isinstance(v, Tensor):
            if v.device.type != NAME:
                strangers.append((key, v))
                return v
            if key in schema.outputs and v.numel() <= 1:  # perhaps to be resized, which borrowed memory cannot be
                made = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype)
                replaced.append((v, made))
                return made
            same = _on_host(v)
            known[same.untyped_storage()._cdata] = v
            if key in schema.outputs:
                outputs.append((v, same))
            return same
        if isinstance(v, (list, tuple)):
            return [on_host(key, part) for part in v]
        if isinstance(v, (bool, int, float, complex)) and key in schema.tensors:  # a number comes as one
            return _number(v, next((t.dtype for t in values.values() if isinstance(t, Tensor)), None))
        return _HOST if isinstance(v, torch.device) else v

    own = {key: on_host(key, v) for key, v in values.items()}
    if strangers and (known or replaced):
        _refuse_mixing(op, schema, strangers)
    if schema.name == "_index_put_impl_":  # before "index", PyTorch itself looks for what is true
        for _ in (t for t in values["indices"] if t is not None and t.dtype == torch.bool):
            _note("reads")
    if schema.seeded:
        with _random_numbers(own.get("generator")):
            found = op(**own)
    else:
        found = op(**own)
    for output, made in replaced:
        if made.shape != output.shape:
            output.data = _to_device(made)
        else:
            _on_host(output).copy_(made)
    for output, same in outputs:
        if same.shape != output.shape:
            aten.as_strided_(output, same.shape, same.stride(), same.storage_offset())
    if schema.returns == [True]:
        return values[schema.written[0]]

    def wrapped(v: Any) -> Any:
        if isinstance(v, (list, tuple)):
            return type(v)(map(wrapped, v))
        if not isinstance(v, Tensor):
            return v
        base = known.get(v.untyped_storage()._cdata)
        return _to_device(v) if base is None else _view(base, v.shape, v.stride(), v.storage_offset())

    if len(schema.returns) == 1:
        return wrapped(found)
    written = (values[key] for key in schema.written if values.get(key) is not None)
    return tuple(next(written) if w else wrapped(v) for w, v in zip(schema.returns, found or (), strict=True)) or None


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


@cache
def _number(value: float, other: torch.dtype | None) -> Tensor:
    """As a tensor that does not change the dtype of what it meets."""
    other = other or torch.get_default_dtype()
    fits = isinstance(value, (bool, int)) or other.is_floating_point or other.is_complex
    return torch.tensor(value, dtype=other if fits and other != torch.bool else None)


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _refuse_mixing(op: Any, schema: _Schema, strangers: list[tuple[str, Tensor]]) -> None:
    for key, t in strangers:
        if schema.name in INDEXED and key == "indices":
            if schema.name != "index":  # PyTorch has moved those, which was seen
                _note("copies")
        elif t.ndim or not schema.takes_scalars or key in schema.written:
            raise RuntimeError(f"{op}: {key} is on {t.device}, others are on {NAME}, in {_place()}")


@contextmanager
def _random_numbers(generator: torch.Generator | None) -> Iterator[None]:
    """Random numbers come from a generator of the device."""
    if generator is not None:
        if generator._cdata not in _generators:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device}'")
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(_generator.get_state())
    try:
        yield
    finally:
        _generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def _new(size: Any, stride: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _empty(size, stride, torch.get_default_dtype() if dtype is None else dtype)


def _new_like(size: Any, *, dtype: torch.dtype | None = None, memory_format: Any = None, **_: Any) -> Tensor:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    layout = torch.contiguous_format if memory_format in (None, torch.preserve_format) else memory_format
    return _empty(size, torch.empty(size, device="meta", memory_format=layout).stride(), dtype)


def _copied(source: Tensor, destination: Tensor, non_blocking: bool = False) -> Tensor:
    here, there = _pretends(source), _pretends(destination)
    if here != there:
        _note("reads" if here else "copies")
    on_host = [_on_host(t) if of_device else t for t, of_device in ((source, here), (destination, there))]
    on_host[1].copy_(on_host[0])
    return destination


def _viewed(t: Tensor, size: Any) -> Tensor:
    found = _on_host(t).view(size)
    return _view(t, found.shape, found.stride())


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    return _run(aten.convolution.default, x, weight, bias, *how)


def _convolved_backward(grad: Tensor, x: Tensor, weight: Tensor, *how: Any) -> Any:
    *how, mask = how
    sizes = [how[5] * weight.shape[1] if how[3] else weight.shape[0]]  # groups, transposed
    return _run(aten.convolution_backward.default, grad, x, weight, sizes, *how, mask)


KERNELS = {
    "empty.memory_format": _new_like,
    "empty_strided": _new,
    "as_strided": _view,
    "view": _viewed,
    "_reshape_alias": _view,
    "_copy_from": _copied,
    "convolution_overrideable": _convolved,
    "convolution_backward_overrideable": _convolved_backward,
}


# --- what PyTorch knows of it -----------------------------------------------------------------------------------------


class _Module(_DummyBackendModule):
    """``torch.pretend``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        _generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return _generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        _generator.set_state(state)

    def current_stream(self, device: Any = None) -> _Stream:
        """What checkpoints ask of any device that there is, for tensors on the CPU as well."""
        return _STREAM

    def stream(self, stream: _Stream) -> AbstractContextManager[None]:
        return nullcontext()


class _Stream:
    """The only one: nothing is ever under way."""

    def synchronize(self) -> None:
        pass


_STREAM = _Stream()


class Generator(torch.Generator):
    """``torch.Generator`` with the device among those that it knows."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        here = torch.device(device).type == NAME
        made = super().__new__(cls, "cpu" if here else device)
        if here:
            _generators.add(made._cdata)
        return made

    def __del__(self) -> None:
        _generators.discard(self._cdata)

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0) if self._cdata in _generators else super().device

    def clone_state(self) -> Generator:
        made = Generator(self.device)
        made.set_state(self.get_state())
        return made


def _deepcopy(self: Tensor, memo: dict[int, Any], usual: Any = Tensor.__deepcopy__) -> Tensor:
    if not _pretends(self) or id(self) in memo or not self.is_leaf:
        return usual(self, memo)
    with torch.no_grad():
        made = memo[id(self)] = self.clone().requires_grad_(self.requires_grad)
    made.grad = copy.deepcopy(self.grad, memo)
    made.__dict__ = copy.deepcopy(self.__dict__, memo)
    return made


@contextmanager
def pretending() -> Iterator[torch.device]:
    """A context in which ``torch.Generator`` and copies know the device, which PyTorch asks of a library in C++.

    Backward passes run in the calling thread, so that it is seen who asks.
    """
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(Tensor, "__deepcopy__", _deepcopy)
        swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # as to CUDA: parameters that are tied stay so
        try:
            yield torch.device(NAME)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swapped)


def _register() -> Any:
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "PrivateUse1")
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    return library, everything


_registered = _register()
