"""PyTorch computes in one thread: more of them wait for each other where other tests run beside these."""

import importlib.util

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)
