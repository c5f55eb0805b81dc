"""What the roofline assumes beyond data sheets: the shares of them that kernels reach, gaps, and host time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineConstants:
    """What a data sheet does not say, measured of our own kernels on H200s; other GPUs are given the same.

    Files are those of benchmarks/results/, "_nvidia-h200" left out. "Seen": of NCCL 2.28, by hand; of ours there is no
    measurement yet.
    """

    memory_efficiency: float = 0.90  # ceilings.json: a device-to-device copy moves 4.30 of 4.8 TB/s
    gemm_efficiency: float = 0.78  # ceilings.json: an 8192-cubed bf16 product reaches 771 of 989 TFLOP/s
    # kernels.json, chunk_attention: 308 to 320 of 989 TFLOP/s with prompts of 2,048 tokens (388 to 403 with 8,192)
    prefill_attention_efficiency: float = 0.32
    # decode-step_qwen3-8b.json: 4.12 of 4.8 TB/s, 256 x 1000 tokens (64 x 1000: 3.50; 0.6B: 4.18 and 3.60)
    decode_attention_efficiency: float = 0.86
    # all_reduce_nvidia-h200-x2.json: 2 to 8 MiB, beside the latency, at 298 to 308 of 450 GB/s
    all_reduce_efficiency: float = 0.67
    send_efficiency: float = 0.67  # seen: 64 MiB in 260 us, less 40 us, of 450 GB/s
    # Ramp-up, latency, drain and the way to the next kernel, in a graph too. decode-step_*.json, one sequence: a step
    # less its bytes at a copy's rate is 4.05 us (8B) and 4.34 us (0.6B) a kernel. 0.56 of them lie between kernels; a
    # product takes 4 to 5 us beyond its bytes, attention 7 to 10, the others 1.6.
    kernel_gap_ns: int = 4_200
    # benchmarks/NOTES.md, steps with chunks as graphs: without them the host of Qwen3-0.6B's 28 layers takes 19 ms, of
    # 8B's 36 23 ms (`gllm.graph_sizes`): 0.65 ms for a layer's nine. Torch's part of it is 7 us each (ceilings.json).
    launch_ns: int = 72_000
    kernels_per_layer: int = 9  # 2 norms, 4 products, head norms + rope + cache write, attention, activation
    kernels_per_moe: int = 3  # router, choice, sort, 2 products, sum: three more than a dense MLP
    kernels_per_head: int = 7  # final norm, logits, drawing 2, copies of slots and tokens 3
    # As many times reading all logits as a draw takes, whose arithmetic takes longer: 64 us for 256 x 151,936
    # (decode-step_*.json, though with 32-bit logits; 16-bit ones are read in 18).
    logits_passes: float = 3.5
    max_graph_size: int = 512  # largest captured batch of decodes, at most 512. 0: no graphs, of chunks neither
    # gllm/sim/profiles/*.json, `host`: from a decision until a stage that idles starts, 1.26 (0.6B) and 1.38 ms (8B);
    # from the stage's end until the engine has the tokens, 0.20 and 0.23 ms.
    host_ns: int = 1_320_000
    return_ns: int = 216_000
    intake_ns: int = 0  # from a request's arrival until the engine knows of it; no profile of an H200 has it yet
