"""Launch compiled kernels straight through the CUDA driver.

Triton's launcher takes several microseconds to look at some sixty arguments of which three change
from batch to batch, and is itself compiled for every signature by some releases. Here the driver
finds all arguments where they were the last time.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Sequence
from typing import Any

import torch

# Names as in cuda.h.
NUM_REGS = 4
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
PROGRAMMATIC_STREAM_SERIALIZATION = 6
# What a kernel may take without being asked for more.
STATIC_SHARED_BYTES = 48 << 10


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
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
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise RuntimeError(f"{what} failed: {reason} (CUDA error {status})")


class UnsupportedError(RuntimeError):
    """A kernel asks for something that isn't done here."""


def parameter_sizes(ptx: str, name: str) -> list[int]:
    """Bytes of each parameter of a kernel, from its PTX; none if it isn't there."""
    header = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    bits = re.findall(r"\.param\s+\.[a-z](\d+)\b", header[1] if header else "")
    return [int(n) // 8 for n in bits]


@functools.cache
def _sizes(compiled: Any) -> list[int]:
    """Bytes of each parameter of a kernel; none where Triton keeps no PTX."""
    return parameter_sizes(compiled.asm.get("ptx", ""), compiled.metadata.name)


@functools.cache
def _load(compiled: Any) -> int:
    """Load a kernel into the current context; returns its handle.

    Once only: the caches of instructions don't know another copy for the same code.
    """
    driver, meta = _driver(), compiled.metadata
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    name = meta.name.encode()
    _check(driver.cuModuleLoadData(ctypes.byref(module), compiled.kernel), "loading a kernel")
    _check(driver.cuModuleGetFunction(ctypes.byref(handle), module, name), "loading a kernel")
    if meta.shared > STATIC_SHARED_BYTES:
        status = driver.cuFuncSetAttribute(handle, MAX_DYNAMIC_SHARED_SIZE_BYTES, meta.shared)
        _check(status, "loading a kernel")
    # Drivers load lazily, and not while a kernel waits for another: being asked makes them do it.
    registers = ctypes.c_int()
    _check(driver.cuFuncGetAttribute(ctypes.byref(registers), NUM_REGS, handle), "loading a kernel")
    return handle.value or 0


class DriverLaunch:
    """A kernel on an NVIDIA GPU with its arguments as the driver wants them.

    Parameters
    ----------
    compiled : triton.compiler.CompiledKernel
        It is loaded into the current context.
    args : sequence of int, float or torch.Tensor
        All arguments that aren't constants, in order: int32, float32 and addresses.
    grid : int
        Programs.
    early : bool
        Whether it may start before the kernel ahead of it in its stream has ended.

    Attributes
    ----------
    words : ctypes array
        64 bits by argument: addresses and integers, no floats, can be assigned between launches.

    Raises
    ------
    UnsupportedError
        If the kernel takes other parameters, or there is no PTX to tell.
    RuntimeError
        If the driver can't load the kernel.
    """

    def __init__(self, compiled: Any, args: Sequence[Any], grid: int, early: bool) -> None:
        meta = compiled.metadata
        if meta.global_scratch_size or meta.profile_scratch_size or meta.num_ctas != 1:
            raise UnsupportedError(f"kernel {meta.name} needs scratch memory or a cluster")
        sizes = _sizes(compiled)
        wanted = [8 if isinstance(arg, torch.Tensor) else 4 for arg in args]
        # Triton's own come last: addresses of scratch memory.
        if sizes[: len(args)] != wanted or any(size != 8 for size in sizes[len(args) :]):
            raise UnsupportedError(f"kernel {meta.name} takes {sizes} bytes, got {wanted}")
        function = _load(compiled)
        # Kinds only: the batch that comes first must not be held for ever.
        self._kinds = [type(arg) for arg in args]
        self.words = (ctypes.c_uint64 * len(sizes))()
        for at, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                self.words[at] = arg.data_ptr()
            elif isinstance(arg, float):
                self.words[at] = struct.unpack("<I", struct.pack("<f", arg))[0]
            else:
                self.words[at] = arg
        begin = ctypes.addressof(self.words)
        self._pointers = (ctypes.c_void_p * len(sizes))(*range(begin, begin + 8 * len(sizes), 8))
        self._attribute = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        threads = 32 * meta.num_warps
        self._config = _Config(
            (grid, 1, 1), (threads, 1, 1), meta.shared, None, ctypes.pointer(self._attribute), early
        )
        config, parameters = ctypes.addressof(self._config), ctypes.addressof(self._pointers)
        self._launch = functools.partial(
            _driver().cuLaunchKernelEx, config, function, parameters, None
        )

    def values(self) -> list[int | float]:
        """Give the arguments as Triton's own launch takes them."""
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
