"""Launch compiled kernels straight through the CUDA driver.

Triton's launcher examines some sixty arguments at every launch, of which a handful change from
batch to batch, and some releases compile a launcher for every signature. Here the arguments stay in
memory that the driver reads, and a launch writes only those that change.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Sequence
from typing import Any

import torch

# The names are those of cuda.h.
NUM_REGS = 4
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
PROGRAMMATIC_STREAM_SERIALIZATION = 6
# Shared memory that a kernel may have without setting an attribute.
STATIC_SHARED_BYTES = 48 << 10


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


@functools.cache
def _driver() -> Any:
    """Open the driver's library."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


def _check(status: int, what: str) -> None:
    """Raise a RuntimeError unless the driver has returned 0 for ``what``."""
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise RuntimeError(f"{what} failed: {reason} (CUDA error {status})")


def _enter_context() -> None:
    """Give this thread the current device's context if it has none, as Triton's launcher does.

    torch makes a context current by its first call that needs one, which may not have come yet in
    a thread that was given tensors by another one.
    """
    driver, context, device = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "finding a context")
    if not context.value:
        _check(
            driver.cuDeviceGet(ctypes.byref(device), torch.cuda.current_device()),
            "finding a device",
        )
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "making a context")
        _check(driver.cuCtxSetCurrent(context), "entering a context")


class UnsupportedError(RuntimeError):
    """A kernel needs something that `DriverLaunch` does not provide."""


def parameter_sizes(ptx: str, name: str) -> list[int]:
    """Read the bytes of each parameter of a kernel from its PTX; none if it is not there."""
    header = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    bits = re.findall(r"\.param\s+\.[a-z](\d+)\b", header[1] if header else "")
    return [int(n) // 8 for n in bits]


@functools.cache
def _sizes(compiled: Any) -> list[int]:
    """Return the bytes of each parameter of a kernel; an empty list where Triton keeps no PTX."""
    return parameter_sizes(compiled.asm.get("ptx", ""), compiled.metadata.name)


@functools.cache
def _load(compiled: Any) -> int:
    """Load a kernel into the current context; returns its handle.

    This is done once for a kernel: a second copy of its code would take room of its own in the
    instruction caches.
    """
    driver, meta = _driver(), compiled.metadata
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    name = meta.name.encode()
    _check(driver.cuModuleLoadData(ctypes.byref(module), compiled.kernel), "loading a kernel")
    _check(driver.cuModuleGetFunction(ctypes.byref(handle), module, name), "loading a kernel")
    if meta.shared > STATIC_SHARED_BYTES:
        status = driver.cuFuncSetAttribute(handle, MAX_DYNAMIC_SHARED_SIZE_BYTES, meta.shared)
        _check(status, "loading a kernel")
    # A driver loads lazily, which it can't do while a kernel waits for another one. A query of an
    # attribute makes it load the code here.
    registers = ctypes.c_int()
    _check(driver.cuFuncGetAttribute(ctypes.byref(registers), NUM_REGS, handle), "loading a kernel")
    return handle.value or 0


class DriverLaunch:
    """A kernel on an NVIDIA GPU with its arguments in the form that the driver reads.

    Parameters
    ----------
    compiled : triton.compiler.CompiledKernel
        The kernel; it is loaded into the current context, which this thread gets if it has none.
    args : sequence of int, float or torch.Tensor
        All run-time arguments in order: int32, float32 and addresses.
    grid : int
        Number of programs.
    early : bool
        Whether the kernel may start before the kernel ahead of it in its stream has ended.

    Attributes
    ----------
    words : ctypes array
        64 bits for each argument. Addresses and integers, but no floats, can be assigned between
        launches.

    Raises
    ------
    UnsupportedError
        If the kernel takes other parameters than ``args``, or if there is no PTX to tell.
    RuntimeError
        If the driver can't load the kernel.
    """

    def __init__(self, compiled: Any, args: Sequence[Any], grid: int, early: bool) -> None:
        meta = compiled.metadata
        if meta.global_scratch_size or meta.profile_scratch_size or meta.num_ctas != 1:
            raise UnsupportedError(f"kernel {meta.name} needs scratch memory or a cluster")
        sizes = _sizes(compiled)
        wanted = [8 if isinstance(arg, torch.Tensor) else 4 for arg in args]
        # Triton's own parameters come last. They are addresses of scratch memory.
        if sizes[: len(args)] != wanted or any(size != 8 for size in sizes[len(args) :]):
            raise UnsupportedError(f"kernel {meta.name} takes {sizes} bytes, got {wanted}")
        _enter_context()
        function = _load(compiled)
        # Only the types are kept: a tensor of the first batch would never be freed.
        self._kinds = [type(arg) for arg in args]
        self.words = (ctypes.c_uint64 * len(sizes))()
        begin = ctypes.addressof(self.words)
        self._pointers = (ctypes.c_void_p * len(sizes))(*range(begin, begin + 8 * len(sizes), 8))
        self._attribute = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        threads = 32 * meta.num_warps
        self._config = _Config(
            (grid, 1, 1), (threads, 1, 1), meta.shared, None, ctypes.pointer(self._attribute), early
        )
        self.assign(args, grid)
        config, parameters = ctypes.addressof(self._config), ctypes.addressof(self._pointers)
        self._launch = functools.partial(
            _driver().cuLaunchKernelEx, config, function, parameters, None
        )

    def assign(self, args: Sequence[Any], grid: int) -> None:
        """Take over arguments of the same types, and the number of programs."""
        words = self.words
        for at, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                words[at] = arg.data_ptr()
            elif isinstance(arg, float):
                words[at] = struct.unpack("<I", struct.pack("<f", arg))[0]
            else:
                words[at] = arg
        self._config.grid[0] = grid

    def values(self) -> list[int | float]:
        """Return the arguments as Triton's own launch takes them."""
        values: list[int | float] = []
        for kind, word in zip(self._kinds, self.words, strict=False):
            low = word & 0xFFFFFFFF
            if issubclass(kind, torch.Tensor):
                values.append(word)
            elif issubclass(kind, float):
                values.append(struct.unpack("<f", struct.pack("<I", low))[0])
            else:
                values.append(ctypes.c_int32(low).value)
        return values

    def launch(self, stream: int) -> None:
        """Launch on a stream of the current device."""
        self._config.stream = stream
        status = self._launch()
        if status:
            _check(status, "launching a kernel")
