"""Compile and launch any kernel."""

from __future__ import annotations

import copy
import ctypes
import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from lplb_triton.kernels.driver import DriverLaunch, UnsupportedError
from lplb_triton.kernels.pdl import await_previous

# The oldest CUDA driver whose graphs have edges for programmatic dependent launch: 12.3.
PDL_DRIVER = 12030

# Compiled kernels by what they were compiled for. Triton's own launch examines every argument each
# time; no kernel here is specialised on values or alignment, so types and constants suffice.
compiled_kernels: dict[tuple[Any, ...], Any] = {}
# Integers outside of these are int64 arguments of a kernel, others int32.
_LEAST_INT32, _MOST_INT32 = -(1 << 31), (1 << 31) - 1


class _Launches(threading.local):
    """The launches of `launch_call` by the same keys.

    Each thread has its own: arguments are written to a launch before it is made. With a lock in
    place of that, a thread whose GPU takes no further launch would hold up those of other GPUs,
    which its own may be waiting for.
    """

    def __init__(self) -> None:
        self.by_key: dict[tuple[Any, ...], PreparedKernel] = {}


_launches = _Launches()


class KernelCall(NamedTuple):
    """A kernel and all that a launch of it needs."""

    kernel: Any
    """A function decorated with `triton.jit`; its compile-time arguments come last."""
    grid: int
    """Number of programs."""
    args: tuple[Any, ...]
    """Run-time arguments in order, a tensor first."""
    constants: tuple[int | bool, ...]
    """Compile-time arguments in order."""
    options: dict[str, Any]
    """Compiler options, such as ``num_warps``."""


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, under Triton's interpreter."""
    return isinstance(await_previous, InterpretedFunction)


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Whether a kernel can start before the one ahead of it has ended, in a graph too.

    That takes a Hopper GPU or a newer one, and a driver whose graphs have such edges.
    """
    if device.type != "cuda" or is_interpreted() or torch.version.hip is not None:
        return False
    version = ctypes.c_int()
    failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    recent = not failed and version.value >= PDL_DRIVER
    return recent and torch.cuda.get_device_capability(device) >= (9, 0)


def use_device(device: int | None) -> AbstractContextManager[object]:
    """Make a GPU the current one for a while, since Triton launches there."""
    if device is None or device == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def is_profiled() -> bool:
    """Whether a hook of Triton's, such as a profiler's, waits for launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def _key(call: KernelCall) -> tuple[Any, ...]:
    """Return what the compiled kernel of a call depends on."""
    kinds = tuple(
        [
            a.dtype
            if isinstance(a, torch.Tensor)
            else torch.int64
            if type(a) is int and not _LEAST_INT32 <= a <= _MOST_INT32
            else type(a)
            for a in call.args
        ]
    )
    return call.kernel, call.args[0].device.index, call.constants, kinds


def _compile(call: KernelCall) -> Any:
    """Compile the kernel of a call for the GPU of its tensors."""
    with use_device(call.args[0].device.index):
        args, grid = (*call.args, *call.constants), (call.grid,)
        return call.kernel.warmup(*args, grid=grid, **call.options)


def compile_calls(calls: Sequence[KernelCall]) -> list[Any]:
    """Return the compiled kernels of these calls; those that are new compile in parallel."""
    new = {key: call for call in calls if (key := _key(call)) not in compiled_kernels}
    if new:
        with ThreadPoolExecutor(len(new)) as pool:
            compiled_kernels.update(zip(new, pool.map(_compile, new.values()), strict=True))
    return [compiled_kernels[_key(call)] for call in calls]


def launch_call(call: KernelCall, stream: int | None = None) -> None:
    """Launch on the GPU of the tensors, on its current stream or another; the first call compiles.

    ``stream`` is the handle of a stream of that GPU.
    """
    kernel, grid, args, constants, _ = call
    if isinstance(kernel, InterpretedFunction):
        kernel[(grid,)](*args, *constants)
        return
    device, key = args[0].device.index, _key(call)
    if stream is None:
        stream = triton.runtime.driver.active.get_current_stream(device)
    launch = _launches.by_key.get(key)
    if launch is None:
        launch = PreparedKernel(call, compile_calls([call])[0], early=False)
        _launches.by_key[key] = launch
    else:
        launch.assign(call)
    with use_device(device):
        launch.launch(stream, is_profiled())


class PreparedKernel:
    """A compiled kernel with its arguments, ready to launch many times.

    Parameters
    ----------
    call : KernelCall
        The arguments of the first launch; no tensor of it is kept.
    compiled : triton.compiler.CompiledKernel
        What `compile_calls` returned for it.
    early : bool
        Whether the kernel may start before the one ahead of it in its stream has ended, where the
        GPU can do that (programmatic dependent launch). The kernel has to wait for that one by
        itself.

    Attributes
    ----------
    args : mutable sequence
        Run-time arguments, tensors as addresses: addresses and integers can be assigned between
        launches.
    n_args : int
        The number of run-time arguments; `args` may be longer.
    grid : int
        Number of programs.
    """

    args: Any

    def __init__(self, call: KernelCall, compiled: Any, early: bool) -> None:
        self.n_args = len(call.args)
        self.grid, self._constants, self._compiled = call.grid, call.constants, compiled
        early = early and supports_pdl(call.args[0].device)
        self._direct: DriverLaunch | None = None
        if torch.version.hip is None:
            with use_device(call.args[0].device.index), suppress(UnsupportedError):
                self._direct = DriverLaunch(compiled, call.args, call.grid, early)
                self.args = self._direct.words
        if self._direct is None:
            self.args = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in call.args]
            # Whether a launch is early is an attribute of the launcher, not of the compiled code,
            # which other launches share: this one gets a launcher of its own. The first use of a
            # kernel loads it, for the current device.
            with use_device(call.args[0].device.index):
                self._launcher = copy.copy(compiled.run)
            self._launcher.launch_pdl = early

    def assign(self, call: KernelCall) -> None:
        """Take over all arguments and the grid of another call of the same kernel."""
        self.grid = call.grid
        if self._direct is not None:
            self._direct.assign(call.args, call.grid)
        else:
            for at, arg in enumerate(call.args):
                self.args[at] = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg

    def launch(self, stream: int, profiled: bool) -> None:
        """Launch on a stream of the current device; ``profiled`` is what `is_profiled` returns."""
        if profiled:
            # Triton's own launch collects what its hooks are called with.
            args = self.args if self._direct is None else self._direct.values()
            grid = self.grid, 1, 1
            self._compiled[grid](*args, *self._constants, stream=stream)
        elif self._direct is not None:
            self._direct.launch(stream)
        else:
            compiled = self._compiled
            self._launcher(
                self.grid, 1, 1, stream, compiled.function, compiled.packed_metadata,
                None, None, None, *self.args, *self._constants,
            )  # fmt: skip
