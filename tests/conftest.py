"""One thread a process: the tensors of these tests are tiny, and threads that wait for each other are not.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be said before Triton is imported.
"""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
