"""What train.py sets for its process is undone between tests, which share one."""
import pytest
import torch


@pytest.fixture(autouse=True)
def kernels():
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
