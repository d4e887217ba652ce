"""Every kernel compiles, in 16 and in 32 bits: the interpreter runs what the compiler refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

from muse_hf import kernels


def test_every_kernel_compiles_for_a_gpu_that_is_not_there():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling"]
    compiled = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    sources = "".join(path.read_text() for path in Path(kernels.__file__).parent.glob("*.py"))
    assert {*compiled.stdout.split()} == {*re.findall(r"def (_\w+_kernel)\(", sources)}
