"""Every kernel compiles, in 16 and in 32 bits: the interpreter runs what the compiler refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

from muse_hf import kernels

ROOT = Path(__file__).parents[2]


def test_every_kernel_compiles_for_a_gpu_that_is_not_there():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiling"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = {tuple(line.split()) for line in done.stdout.splitlines()}
    sources = "".join(path.read_text() for path in Path(kernels.__file__).parent.glob("*.py"))
    for dtype in ("torch.bfloat16", "torch.float32"):
        names = {name for for_dtype, name in compiled if for_dtype == dtype}
        assert names == {*re.findall(r"def (_\w+_kernel)\(", sources)}, dtype
