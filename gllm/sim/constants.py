"""What the roofline assumes beyond data sheets: the shares of them that kernels reach, gaps, and host time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineConstants:
    """What a data sheet does not say.

    "Measured": benchmarks/results/ceilings_nvidia-h200.json. "Seen": on H200 with torch 2.11, NCCL 2.28 and
    flash-attn 4, by hand; a profile will replace these.
    """

    memory_efficiency: float = 0.90  # measured: a device-to-device copy moves 4.30 of 4.8 TB/s
    gemm_efficiency: float = 0.78  # measured: an 8192-cubed bf16 product reaches 771 of 989 TFLOP/s
    prefill_attention_efficiency: float = 0.50  # seen: 464 to 505 of 989 TFLOP/s, causal, 8 x 2048 tokens
    decode_attention_efficiency: float = 0.68  # seen: 3.3 of 4.8 TB/s at best, 64 x 1150 tokens
    all_reduce_efficiency: float = 0.78  # seen: 64 MiB over 4 GPUs in 323 us, less 37 us, of 450 GB/s
    send_efficiency: float = 0.67  # seen: 64 MiB in 260 us, less 40 us, of 450 GB/s
    kernel_gap_ns: int = 2_000  # ramp-up and drain, in a graph too; a kernel that does nothing takes 0.9 us (measured)
    launch_ns: int = 7_000  # measured: host time to launch a kernel from torch
    kernels_per_layer: int = 11  # 2 norms, 4 projections, head norm + rope + cache write 2, attention 2, activation
    kernels_per_moe: int = 5  # beyond a dense MLP: scores, top-k, sort, scatter, sum
    kernels_per_head: int = 8  # final norm, gather, logits, and a sampler of a few
    logits_passes: int = 3  # times 32-bit logits cross memory: written, then read twice by the sampler
    max_graph_size: int = 512  # largest captured batch; sizes 1, 2, 4, 8, then steps of 8. 0: no graphs
    host_ns: int = 200_000  # plan message, input tensors, first launch; an assumption until profiled
    return_ns: int = 100_000  # copy of sampled tokens to the host and a message; an assumption until profiled
