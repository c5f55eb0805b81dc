"""What Triton is asked to compile, on machines without a GPU: `python -m runtime.diverted CHECK ARGUMENT...`.

Of its own process, since the other tests have Triton's interpreter in Triton's place. Prints a JSON value.
"""

import json
import random
import re
import struct
import sys
from contextlib import suppress
from types import SimpleNamespace

import torch
from gllm_kernels.filters import likely_floors_triton
from gllm_kernels.rms_norm import add_rms_norm_triton
from gllm_kernels.silu_and_mul import silu_and_mul_triton
from triton import knobs

from gllm.parallel import Parallel
from gllm.policy import parse_policy
from gllm.runtime.config import RuntimeConfig
from gllm.runtime.messages import Admission, ChunkWork, Step
from gllm.runtime.sampling_params import SamplingParams
from gllm.runtime.worker import compile_ahead, first_steps

NUM_STEPS = 40


def traffic(limits, max_tokens, seed):
    """Steps as an engine makes them: prompts in chunks, decodes of any number, small and large."""
    rng = random.Random(seed)
    free, left, decoding = list(range(limits.max_num_seqs)), {}, []
    for plan in range(NUM_STEPS):
        admissions, chunks, tokens = [], [], rng.choice([1, 17, 300, max_tokens])
        for _ in range(rng.choice([0, 0, 1, 3, 100, 600])):
            if free:
                slot, num = free.pop(), rng.randint(1, 3 * limits.block_size)
                filtered = rng.random() < 0.1
                params = SamplingParams(top_k=5) if filtered else SamplingParams()
                admissions.append(Admission(slot, [0] * num, num, params, 0, []))
                left[slot] = (0, num)
        for slot, (start, num) in list(left.items()):
            part = min(num - start, rng.randint(1, 40), tokens)
            if part == 0:
                break
            tokens -= part
            blocks = -(-(start + part) // limits.block_size) - -(-start // limits.block_size)
            chunks.append(ChunkWork(slot, start, part, start + part == num, [0] * blocks))
            left[slot] = (start + part, num)
        decodes = rng.sample(decoding, rng.choice([0, min(1, len(decoding)), len(decoding) // 3, len(decoding)]))
        if decodes or chunks:
            packed, grown = struct.pack(f"{len(decodes)}i", *decodes), [(slot, 0) for slot in decodes[::7]]
            yield Step(plan, admissions, chunks, len(decodes), packed, grown, plan - 1)
        ended = [chunk.slot for chunk in chunks if chunk.final]
        for slot in ended:
            del left[slot]
        decoding += ended


def missed(folder, layout, options):
    """What traffic launches and the first steps do not."""
    config = RuntimeConfig(model=folder, parallel=Parallel(**json.loads(layout)), **json.loads(options))
    model = config.check()
    found = []
    compile_ahead.divert_launches(lambda kernel, told: found.append((kernel.fn.__name__, told)), arch=90)
    first_steps.take_first_steps(config)
    num_first = len(found)
    limits = config.limits(1)
    max_tokens = parse_policy(config.policy).max_batch_tokens(limits)
    for shard in first_steps.local_shards(config, model.shape):
        stage = first_steps.make_stage(config, model, shard)
        with first_steps.without_device():
            if config.cuda_graphs:
                stage.capture(max_tokens)
            for step in traffic(limits, max_tokens, seed=0):
                stage.run(step)
    return {
        "first": sorted({name for name, _ in found[:num_first]}),
        "missed": found[num_first:],
        "imports_dynamo": "torch._dynamo" in sys.modules,
    }


def early(folder):
    """Of each kernel that is launched early: where it waits, lets the next start and uses memory, in order."""
    told = []
    compile_ahead.divert_launches(lambda kernel, variant: told.append((kernel, variant)), arch=90)
    first_steps.take_first_steps(RuntimeConfig(model=folder))
    knobs.runtime.jit_cache_hook = None
    memory = r"(?:ld|st|atom|red)\.[\w.]*global|cp\.async\S*\.global"
    found = []
    for kernel, variant in told:
        if json.loads(variant)["options"].get("launch_pdl"):
            ptx = kernel.preload(variant).asm["ptx"]
            found.append((kernel.fn.__name__, re.findall(rf"griddepcontrol\.\w+|{memory}", ptx)))
    return found


def later():
    """Whether torch's compiler is left alone on the meta device, and what it makes in the same process afterwards."""
    with first_steps.without_device():
        assert torch.arange(3, device="meta").add(1).is_meta
    imported = "torch._dynamo" in sys.modules
    made = torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
    return {"imported": imported, "made": made.tolist()}


def hits():
    """For launches with tensors that are there: whether Triton finds in its cache what was compiled ahead."""
    told = {}
    compile_ahead.divert_launches(lambda kernel, variant: told.setdefault(variant, kernel), arch=90)
    launch("meta")
    compilers = compile_ahead.Compilers(2)
    for variant, kernel in told.items():
        compilers.submit(lambda kernel=kernel, variant=variant: compile_ahead.compile_variant(kernel, variant))
    compilers.join()
    found = {}
    knobs.runtime.jit_cache_hook = None
    knobs.compilation.listener = lambda *, src, cache_hit, **_: found.update({src.name: cache_hit})
    launch("cpu")
    return found


def launch(device):
    """A number among the constants; one of several widths; strides and tensors that begin anywhere."""
    x = torch.zeros(3, 96, dtype=torch.bfloat16, device=device)
    int64, float32 = (torch.zeros(3, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    calls = [
        lambda: add_rms_norm_triton(x, x.clone(), x[0], 1e-6),
        lambda: silu_and_mul_triton(x),
        lambda: likely_floors_triton(x[:2, 3:], int64[1:], float32, int64, float32, float32),
    ]
    for call in calls:
        with suppress(Exception):  # there is no GPU to launch on; what was looked up before is told
            call()


if __name__ == "__main__":
    torch.cuda.get_device_properties = lambda _device: SimpleNamespace(multi_processor_count=132)
    json.dump({"missed": missed, "hits": hits, "early": early, "later": later}[sys.argv[1]](*sys.argv[2:]), sys.stdout)
