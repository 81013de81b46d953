"""One thread a process, as tensors are small here and two workers share two cores; what train.py sets for its
process is undone between tests, which share one."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")                  # of the programs that tests start, too

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def kernels():
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
