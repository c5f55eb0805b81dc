"""What drivers call a GPU, and what the simulator does."""

import pytest

from gllm.gpu_names import GPU_NAMES, gpu_name
from gllm.sim.gpus import GPUS


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", None),
        ("cpu", None),
    ],
)
def test_devices_have_the_simulators_names(device, name):
    assert gpu_name(device) == name


def test_the_simulators_gpus_are_known():
    assert set(GPU_NAMES) == set(GPUS)
