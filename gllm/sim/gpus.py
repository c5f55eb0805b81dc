"""Data sheets of GPUs: what a roofline needs to know of the hardware.

Peaks are the makers' (dense, 16-bit inputs, 32-bit accumulation, no sparsity); how much of them kernels reach is
`gllm.sim.roofline`'s to say. Memory is what the driver reports (nvidia-smi), which is less than the label.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1024 * 1024
_GB = 1_000_000_000
_TFLOP = 1_000_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU and its link to the others of its host."""

    name: str
    memory_bytes: int
    l2_bytes: int
    bandwidth_bytes_per_s: int
    bf16_flop_per_s: int
    link_bytes_per_s: int  # one direction
    all_reduce_latency_ns: int  # of a few KB
    send_latency_ns: int  # of a few KB to a neighbour
    source: str


# 8 KiB on H200s: our all-reduce 4.4 us in a CUDA graph on two (benchmarks/results/all_reduce_nvidia-h200-x2.json; on
# more nobody has measured it), NCCL 2.28's send/recv 36 to 42 us on four. Most of it is launch and handshake, so other
# NVLink parts are given the same figures; those of PCIe parts, where NCCL sums, are an assumption, not a measurement.
_NVLINK_ALL_REDUCE_NS, _NVLINK_SEND_NS = 4_400, 40_000
_PCIE_ALL_REDUCE_NS, _PCIE_SEND_NS = 50_000, 45_000


def _nvlink(
    name: str, *, memory_mib: int, l2_mib: int, bandwidth_gb: int, tflops: int, link_gb: int, source: str
) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=memory_mib * _MIB,
        l2_bytes=l2_mib * _MIB,
        bandwidth_bytes_per_s=bandwidth_gb * _GB,
        bf16_flop_per_s=tflops * _TFLOP,
        link_bytes_per_s=link_gb * _GB,
        all_reduce_latency_ns=_NVLINK_ALL_REDUCE_NS,
        send_latency_ns=_NVLINK_SEND_NS,
        source=source,
    )


def _pcie4(name: str, *, memory_mib: int, l2_mib: int, bandwidth_gb: int, tflops: float, source: str) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=memory_mib * _MIB,
        l2_bytes=l2_mib * _MIB,
        bandwidth_bytes_per_s=bandwidth_gb * _GB,
        bf16_flop_per_s=int(tflops * _TFLOP),
        link_bytes_per_s=32 * _GB,  # Gen4 x16: 64 GB/s both ways
        all_reduce_latency_ns=_PCIE_ALL_REDUCE_NS,
        send_latency_ns=_PCIE_SEND_NS,
        source=source,
    )


# Links: the data sheets give the sum of both directions; half of it stands here.
# L2 caches: 60 MiB is what an H200 says of itself; the others are as published, and measured by nobody here.
GPUS: dict[str, Gpu] = {
    "h200": _nvlink(
        "h200",
        memory_mib=143_771,
        l2_mib=60,
        bandwidth_gb=4800,
        tflops=989,
        link_gb=450,
        source="NVIDIA H200 Tensor Core GPU data sheet, SXM (1,979 TFLOP/s is with sparsity)",
    ),
    "h100": _nvlink(
        "h100",
        memory_mib=81_559,
        l2_mib=50,
        bandwidth_gb=3350,
        tflops=989,
        link_gb=450,
        source="NVIDIA H100 Tensor Core GPU data sheet, SXM (1,979 TFLOP/s is with sparsity)",
    ),
    "a100-40g": _nvlink(
        "a100-40g",
        memory_mib=40_960,
        l2_mib=40,
        bandwidth_gb=1555,
        tflops=312,
        link_gb=300,
        source="NVIDIA A100 Tensor Core GPU data sheet, 40 GB SXM",
    ),
    "a100-80g": _nvlink(
        "a100-80g",
        memory_mib=81_920,
        l2_mib=40,
        bandwidth_gb=2039,
        tflops=312,
        link_gb=300,
        source="NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM",
    ),
    "a800": _nvlink(
        "a800",
        memory_mib=81_920,
        l2_mib=40,
        bandwidth_gb=2039,
        tflops=312,
        link_gb=200,
        source="NVIDIA A800 80 GB SXM: the A100's data sheet with NVLink at 400 GB/s",
    ),
    "b200": _nvlink(
        "b200",
        memory_mib=183_359,
        l2_mib=126,
        bandwidth_gb=8000,
        tflops=2250,
        link_gb=900,
        source="NVIDIA Blackwell architecture technical brief, B200 (4.5 PFLOP/s is with sparsity)",
    ),
    "l20": _pcie4(
        "l20",
        memory_mib=46_068,
        l2_mib=96,
        bandwidth_gb=864,
        tflops=119.5,
        source="NVIDIA L20 product brief",
    ),
    "l40s": _pcie4(
        "l40s",
        memory_mib=46_068,
        l2_mib=96,
        bandwidth_gb=864,
        tflops=362.05,
        source="NVIDIA L40S data sheet (733 TFLOP/s is with sparsity)",
    ),
    "l4": _pcie4(
        "l4",
        memory_mib=23_034,
        l2_mib=48,
        bandwidth_gb=300,
        tflops=121,
        source="NVIDIA L4 data sheet (242 TFLOP/s is with sparsity)",
    ),
    "rtx-4090": _pcie4(
        "rtx-4090",
        memory_mib=24_564,
        l2_mib=72,
        bandwidth_gb=1008,
        tflops=165.2,
        source="NVIDIA Ada GPU architecture white paper, GeForce RTX 4090 (32-bit accumulation)",
    ),
}


def get_gpu(name: str) -> Gpu:
    """Look a GPU up by name; upper case does not matter.

    Raises:
        ValueError: no such name.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ValueError(f"gpu {name!r} is not known; choose one of {', '.join(sorted(GPUS))}")
    return gpu
