"""One thread a process: the tensors of these tests are tiny, and threads that wait for each other are not.

Nothing is looked for on the Hub: a name that is nowhere is not asked for again and again without a network.
Without a GPU the Triton kernels run in Triton's interpreter. Both have to be said before the first import.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
