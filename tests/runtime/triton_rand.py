"""Print, as JSON, what `tl.rand` gives for the seeds and offsets on the command line; run with TRITON_INTERPRET=1."""

import json
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def store_rand(seed, offsets, out, num: tl.constexpr):
    lane = tl.arange(0, num)
    tl.store(out + lane, tl.rand(seed, tl.load(offsets + lane)))


def rand(seed, offsets):
    out = torch.empty(len(offsets))
    store_rand[(1,)](seed, torch.tensor(offsets), out, len(offsets))
    return out.tolist()


if __name__ == "__main__":
    seeds, offsets = json.loads(sys.argv[1])
    print(json.dumps([rand(seed, offsets) for seed in seeds]))  # noqa: T201
