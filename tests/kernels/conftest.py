"""One suite for GPUs and for Triton's interpreter on a CPU."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def device():
    """Where kernels run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
