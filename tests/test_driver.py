"""Launches through the CUDA driver: what it is handed, and when Triton's launcher takes over."""

import ctypes
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton

from lplb_triton import Balancer
from lplb_triton.kernels import driver, launch
from lplb_triton.kernels.launch import KernelCall, PreparedKernel
from lplb_triton.testing.instances import shape_placement

pytestmark = pytest.mark.both


class FakeDriver:
    """Keeps what it is told; a kernel has parameters of ``sizes`` bytes."""

    def __init__(self, sizes, status=0):
        self.sizes, self.status = sizes, status
        self.shared, self.launched, self.loaded = [], [], 0
        self.context, self.entered = 5, []

    def cuCtxGetCurrent(self, context):  # noqa: N802
        context._obj.value = self.context
        return 0

    def cuDeviceGet(self, device, number):  # noqa: N802
        device._obj.value = 10 + number
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):  # noqa: N802
        context._obj.value = 100 + device.value
        return 0

    def cuCtxSetCurrent(self, context):  # noqa: N802
        self.entered.append(context.value)
        return 0

    def cuModuleLoadData(self, module, image):  # noqa: N802
        self.loaded += 1
        module._obj.value = 7
        return 0 if image == b"cubin" else 200

    def cuModuleGetFunction(self, handle, module, name):  # noqa: N802
        handle._obj.value = 11
        return 0 if module.value == 7 and name == b"kernel" else 500

    def cuFuncSetAttribute(self, handle, attribute, value):  # noqa: N802
        self.shared.append((handle.value, attribute, value))
        return 0

    def cuFuncGetAttribute(self, value, attribute, handle):  # noqa: N802
        value._obj.value = 32
        return 0 if attribute == driver.NUM_REGS and handle.value == 11 else 1

    def cuLaunchKernelEx(self, config, function, parameters, extra):  # noqa: N802
        config = driver._Config.from_address(config)
        pointers = (ctypes.c_void_p * len(self.sizes)).from_address(parameters)
        values = [
            (ctypes.c_uint64 if size == 8 else ctypes.c_uint32).from_address(pointer).value
            for pointer, size in zip(pointers, self.sizes, strict=True)
        ]
        attribute = config.attributes[0]
        early = [(attribute.id, attribute.value)] * config.n_attributes
        self.launched.append(
            (function, [*config.grid], [*config.block], config.shared_bytes, config.stream, early)
        )
        self.launched.append(values)
        return self.status

    def cuGetErrorString(self, status, text):  # noqa: N802
        text._obj.value = b"no such luck"
        return 0


class Kernel:
    pass


def compiled(sizes, **changes):
    meta = {
        "name": "kernel", "shared": 1024, "num_warps": 4, "num_ctas": 1,
        "global_scratch_size": 0, "profile_scratch_size": 0, **changes,
    }  # fmt: skip
    kernel = Kernel()
    kernel.kernel, kernel.metadata = b"cubin", SimpleNamespace(**meta)
    kinds = {8: ".u64 .ptr .global .align 1", 4: ".u32"}
    parameters = ",\n".join(f"\t.param {kinds[size]} kernel_{i}" for i, size in enumerate(sizes))
    other = ".func  (.param .b32 result) other_kernel(\n\t.param .b64 x\n)"
    kernel.asm = {"ptx": f"{other}\n.visible .entry kernel(\n{parameters}\n)\n.reqntid 128\n{{"}
    return kernel


def test_structures_are_as_in_cuda_h():
    """The launch structures have the sizes and offsets of those in cuda.h."""
    assert ctypes.sizeof(driver._Attribute) == 72 and driver._Attribute.value.offset == 8
    assert ctypes.sizeof(driver._Config) == 56 and driver._Config.stream.offset == 32


@pytest.mark.parametrize("early", [False, True])
def test_what_the_driver_is_handed(monkeypatch, early):
    """The driver is handed the grid, block, stream, attributes and current argument words."""
    sizes = [8, 4, 4, 4, 8, 8]
    fake = FakeDriver(sizes)
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    x = torch.zeros(3)
    kernel = compiled(sizes, shared=50_000)
    launch = driver.DriverLaunch(kernel, (x, -2, 0.5, 3), 17, early)
    driver.DriverLaunch(kernel, (x, 1, 0.5, 1), 18, not early)
    assert fake.loaded == 1
    assert fake.shared == [(11, driver.MAX_DYNAMIC_SHARED_SIZE_BYTES, 50_000)]
    assert launch.values() == [x.data_ptr(), -2, 0.5, 3]
    half = np.float64(0.5)
    assert driver.DriverLaunch(kernel, (x, np.int64(-2), half, 3), 1, early).values() == [
        x.data_ptr(), -2, 0.5, 3,
    ]  # fmt: skip
    launch.words[0] = 1 << 40
    launch.words[3] = 5
    launch.launch(99)
    how, values = fake.launched
    attributes = [(driver.PROGRAMMATIC_STREAM_SERIALIZATION, 1)] * early
    assert how == (11, [17, 1, 1], [128, 1, 1], 50_000, 99, attributes)
    # float32 0.5 is 0x3F000000; Triton's own two are no memory.
    assert values == [1 << 40, 2**32 - 2, 0x3F000000, 5, 0, 0]
    assert launch.values() == [1 << 40, -2, 0.5, 5]
    fake.status = 700
    with pytest.raises(RuntimeError, match=r"launching a kernel failed: no such luck.*700"):
        launch.launch(0)


def test_a_thread_without_a_context_gets_one(monkeypatch):
    """A thread without a context enters that of the current device, others keep theirs."""
    fake = FakeDriver([8, 4])
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    driver.DriverLaunch(compiled([8, 4]), (torch.zeros(1), 4), 1, False)
    assert fake.entered == []
    fake.context = None
    driver.DriverLaunch(compiled([8, 4]), (torch.zeros(1), 4), 1, False)
    assert fake.entered == [113]


def test_no_tensor_is_held(monkeypatch):
    """A prepared kernel keeps no tensor, not even one of the first batch."""
    fake = FakeDriver([8, 4])
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    x = torch.zeros(3)
    gone = weakref.ref(x)
    monkeypatch.setattr("lplb_triton.kernels.launch.supports_pdl", lambda device: False)
    prepared = PreparedKernel(KernelCall(None, 5, (x, 4), (64,), {}), compiled([8, 4]), False)
    assert prepared.args[0] == x.data_ptr()
    del x
    assert gone() is None


@pytest.fixture
def prepare(monkeypatch):
    """Let `launch_call` find made-up kernels, on a made-up driver; returns both lists."""
    fake, made = FakeDriver([8, 4]), []

    def compile_calls(calls):
        made.extend(calls)
        return [compiled([8, 4]) for _ in calls]

    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(launch, "compile_calls", compile_calls)
    monkeypatch.setattr(launch, "is_profiled", lambda: False)
    monkeypatch.setattr(launch, "_launches", launch._Launches())
    return fake, made


def call_of(*args, grid=1):
    return KernelCall("kernel", grid, args, (64,), {})


def test_launches_are_reused_for_arguments_of_the_same_types(prepare):
    """A call takes over grid and arguments; another type or width of a number compiles anew."""
    fake, made = prepare
    x = torch.zeros(3)
    for number, grid in ((1, 5), (-2, 6), (2**31 - 1, 7), (-(2**31), 8)):
        launch.launch_call(call_of(x, number, grid=grid), 9)
        how, values = fake.launched[-2:]
        assert how[1] == [grid, 1, 1] and values == [x.data_ptr(), number % 2**32]
    assert len(made) == 1
    for number in (2**31, -(2**31) - 1, 0.5, True, None):
        assert launch._key(call_of(x, number)) not in launch._launches.by_key
    launch.launch_call(call_of(x, 0.5), 9)
    launch.launch_call(call_of(x, 1), 9)
    assert fake.launched[-3][1] == 0x3F000000 and fake.launched[-1][1] == 1 and len(made) == 2
    launch.launch_call(call_of(x.double(), 1), 9)
    assert len(made) == 3


def test_threads_do_not_wait_for_each_others_launches(prepare):
    """While a launch of one thread is held up, another thread launches the same kernel."""
    fake, _ = prepare
    x, held, go_on = torch.zeros(3), threading.Event(), threading.Event()
    launch_at_once = fake.cuLaunchKernelEx

    def launch_late(*args):
        if not held.is_set():
            held.set()
            go_on.wait(30)
        return launch_at_once(*args)

    fake.cuLaunchKernelEx = launch_late
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(launch.launch_call, call_of(x, 1), 9)
        held.wait(30)
        try:
            pool.submit(launch.launch_call, call_of(x, 2), 9).result(timeout=30)
        finally:
            go_on.set()
        late.result(timeout=30)
    assert [values[1] for values in fake.launched[1::2]] == [2, 1]


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ([8, 8], {}, r"takes \[8, 8\] bytes, got \[8, 4\]"),
        ([8], {}, "takes"),
        ([8, 4, 4], {}, "takes"),
        ([8, 4], {"global_scratch_size": 128}, "scratch"),
        ([8, 4], {"num_ctas": 2}, "cluster"),
        # Without its PTX nobody knows.
        (None, {}, r"takes \[\] bytes"),
    ],
)
def test_what_is_left_to_triton(monkeypatch, sizes, changes, message):
    """Kernels that the driver can't launch are launched by Triton's launcher."""
    fake = FakeDriver(sizes)
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    kernel, args = compiled(sizes or [8, 4], **changes), (torch.zeros(1), 4)
    if sizes is None:
        del kernel.asm["ptx"]
    with pytest.raises(driver.UnsupportedError, match=message):
        driver.DriverLaunch(kernel, args, 1, False)
    assert fake.loaded == 0
    kernel.run, kernel.function, kernel.packed_metadata = Launcher(), 3, "packed"
    prepared = PreparedKernel(KernelCall(None, 5, args, (64,), {}), kernel, False)
    prepared.args[1] = 6
    prepared.launch(8, False)
    assert Launcher.calls.pop() == (
        5, 1, 1, 8, 3, "packed", None, None, None, args[0].data_ptr(), 6, 64,
    )  # fmt: skip


class Launcher:
    calls = []

    def __call__(self, *args):
        self.calls.append(args)


def test_a_kernel_that_cannot_be_loaded(monkeypatch):
    """A kernel that the driver can't load raises with the driver's reason."""
    monkeypatch.setattr(driver, "_driver", lambda: FakeDriver([]))
    kernel = compiled([])
    kernel.kernel = b"something else"
    with pytest.raises(RuntimeError, match=r"loading a kernel failed: no such luck.*200"):
        driver.DriverLaunch(kernel, (), 1, False)


@pytest.mark.gpu
def test_the_driver_and_triton_launch_the_same():
    """The direct launch and Triton's own give the same ids."""
    rng = np.random.default_rng(0)
    placement = shape_placement("cube", rng)
    balancer = Balancer(placement, device="cuda", rank=3)
    idx = torch.from_numpy(rng.integers(-1, placement.n_logical, (500, 8))).cuda()
    want = balancer.run(idx)
    pipeline = next(iter(balancer._backend._scratches.values())).pipeline
    (prepared,) = pipeline._prepared.values()
    assert all(kernel._direct is not None for kernel in prepared)
    seen = []
    # As a profiler would: Triton's own launch, with the same arguments.
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(seen.append)
    try:
        assert torch.equal(balancer.run(idx), want)
    finally:
        hooks.remove(seen.append)
    assert len(seen) == len(prepared)


@pytest.mark.gpu
def test_a_thread_that_did_nothing_on_the_gpu_before():
    """Runs in threads that have not used the GPU give the same ids as the main thread."""
    placement = shape_placement("cube", np.random.default_rng(0))
    balancer = Balancer(placement, device="cuda")
    idx = torch.arange(64, device="cuda").reshape(8, 8)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(balancer.run, idx).result()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(balancer.run, idx).result()
    assert torch.equal(first, second) and torch.equal(first, balancer.run(idx))
