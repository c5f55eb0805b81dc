"""Print, as JSON, the words of Triton's own generator and of ours in a kernel, and our uniforms; run with
TRITON_INTERPRET=1 where there is no GPU. On the command line, as JSON: seeds, steps, and how many counters."""

import json
import sys

import torch
import triton
import triton.language as tl
from gllm_kernels.philox import philox_words, uniform_of


@triton.jit
def store_words(seeds, steps, tritons, ours, uniforms, num: tl.constexpr, first):  # noqa: PLR0917 - a kernel
    seed, step = tl.load(seeds), tl.load(steps)
    lane = tl.arange(0, num)
    w0, w1, w2, w3 = tl.randint4x(seed, (step << 32) | (first + lane).to(tl.int64))
    tl.store(tritons + lane, w0.to(tl.int32, bitcast=True))
    tl.store(tritons + num + lane, w1.to(tl.int32, bitcast=True))
    tl.store(tritons + 2 * num + lane, w2.to(tl.int32, bitcast=True))
    tl.store(tritons + 3 * num + lane, w3.to(tl.int32, bitcast=True))
    w0, w1, w2, w3 = philox_words(seed, first + lane, step)
    tl.store(ours + lane, w0.to(tl.int32, bitcast=True))
    tl.store(ours + num + lane, w1.to(tl.int32, bitcast=True))
    tl.store(ours + 2 * num + lane, w2.to(tl.int32, bitcast=True))
    tl.store(ours + 3 * num + lane, w3.to(tl.int32, bitcast=True))
    tl.store(uniforms + lane, uniform_of(w0))


def words(seed, step, num, first, device):
    """[4, num] words of Triton and of ours, and [num] uniforms of the first word."""
    seeds, steps = torch.tensor([seed], device=device), torch.tensor([step], device=device)
    tritons, ours = (torch.zeros(4, num, dtype=torch.int32, device=device) for _ in range(2))
    uniforms = torch.zeros(num, device=device)
    store_words[(1,)](seeds, steps, tritons, ours, uniforms, num, first)
    return tritons.tolist(), ours.tolist(), uniforms.tolist()


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seeds, steps, firsts, num = json.loads(sys.argv[1])
    print(json.dumps([words(seed, step, num, first, device) for seed in seeds for step in steps for first in firsts]))  # noqa: T201
