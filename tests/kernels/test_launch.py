"""What `launch` keeps, with a stand-in for a kernel: the interpreter compiles nothing."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from muse_hf.kernels import launch as launching
from muse_hf.kernels.launch import ceil_div, launch
from triton import knobs


class Kernel:
    """Writes down what it is launched with, the first time and from then on."""

    arg_names = ("x", "number", "absent", "BLOCK")

    def __init__(self):
        self.compiled, self.launched, self.hooked = [], [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.compiled.append((grid, args, constants))
            return Compiled(self)

        return run


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.hooked.append((grid, args))

    def run(self, *args):
        self.kernel.launched.append(args)


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    active = SimpleNamespace(get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launching, "_compiled", {})  # keys have the address of a kernel
    return "stream"


def test_arguments_of_one_kind_are_compiled_for_once(stream):
    kernel, x, y = Kernel(), torch.zeros(4), torch.zeros(4)
    launch(kernel, (3,), x, 5, None, num_warps=4, BLOCK=16)
    launch(kernel, (2, 7), y, 6, None, num_warps=4, BLOCK=16)
    assert len(kernel.compiled) == 1
    (launched,) = kernel.launched
    assert launched[:3] == (2, 7, 1), "grids have three dimensions"
    assert launched[3:9] == (stream, "function", "metadata", None, None, None)
    assert launched[9:] == (y.data_ptr(), 6, None, 16), "all parameters in their order, without options"


def test_all_that_kernels_are_specialized_on_compiles_anew():
    kernel, x = Kernel(), torch.zeros(8)
    kinds = [(x, 5, None, 16), (x, 1, None, 16), (x, 32, None, 16), (x, 1 << 31, None, 16), (x, 5, None, 32)]
    kinds += [(x[1:], 5, None, 16), (x.half(), 5, None, 16), (x, 5, x, 16), (x, 5, 7, 16), (x, 5, 1.0, 16)]
    for _ in range(2):
        for *args, block in kinds:
            launch(kernel, (1,), *args, BLOCK=block)
    assert len(kernel.compiled) == len(kernel.launched) == len(kinds)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_hear_of_launches(monkeypatch, name):
    kernel, x = Kernel(), torch.zeros(4)
    for _ in range(2):
        launch(kernel, (3,), x, 5, None, BLOCK=16)
    chain = type(getattr(knobs.runtime, name))()
    chain.add(print)
    monkeypatch.setattr(knobs.runtime, name, chain)
    launch(kernel, (3,), x, 5, None, BLOCK=16)
    assert len(kernel.launched) == 1
    assert [grid[:3] for grid, _ in kernel.hooked] == [(3, 1, 1)], "hooks need the usual way to launch"


def test_every_kernel_waits_for_the_one_before_it():
    """They are launched early: a kernel that does not wait reads what is not written yet, now and then."""
    kernels = []
    for path in Path(launching.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and re.fullmatch(r"_\w+_kernel", node.name):
                first = node.body[1 if ast.get_docstring(node) else 0]
                assert ast.unparse(first) == "wait_for_previous_kernel()", f"{node.name} in {path.name}"
                kernels.append(node.name)
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "launch":
                    assert ast.unparse(call.args[0]).endswith("kernel"), f"line {call.lineno} of {path.name}"
    assert len(kernels) > 20


@pytest.mark.parametrize("early", [True, False])
def test_where_kernels_can_wait_they_are_launched_early(monkeypatch, early):
    monkeypatch.setattr(launching, "_can_launch_early", lambda tensor: early)
    kernel, x = Kernel(), torch.zeros(4)
    for _ in range(2):
        launch(kernel, (3,), x, 5, None, BLOCK=16)
    ((_, _, constants),) = kernel.compiled
    assert constants.get("launch_pdl", False) == early
    assert len(kernel.launched) == 1


def test_ceil_div():
    assert [ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
