"""One thread a process: the tensors of these tests are tiny, and threads that wait for each other are not."""

import torch

torch.set_num_threads(1)
