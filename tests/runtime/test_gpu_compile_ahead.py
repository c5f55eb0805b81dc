"""On a GPU, with Triton's cache empty: nothing is left for the worker to compile, and the seconds of each phase.

`pytest -m gpu tests/runtime/test_gpu_compile_ahead.py`; the seconds go to $OUT/compile_ahead.jsonl, and to the terminal
with -s. $GLLM_MODEL names a folder with a config.json instead of the small model.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runtime.test_compile_ahead import DENSE, SPARSE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

AHEAD = """
import sys, time
from gllm.runtime.config import RuntimeConfig
from gllm.runtime.worker.compile_ahead import compile_ahead
start = time.monotonic()
compile_ahead(RuntimeConfig(model=sys.argv[1])).wait()
print(time.monotonic() - start)
"""

SERVED = """
import sys, time
from gllm.runtime.llm import LLM
from gllm.runtime.sampling_params import SamplingParams
start = time.monotonic()
with LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True) as llm:
    started = time.monotonic()
    for params in (SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, top_p=0.9)):
        llm.generate([{"prompt_token_ids": [1] * num} for num in (1, 17, 300)], params, use_tqdm=False)
    print(started - start, time.monotonic() - started)
"""


def run(script, folder, cache):
    """The numbers that a script prints, which has its own cache."""
    done = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-c", script, str(folder)],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [round(float(number), 2) for number in done.stdout.split()]


def built(cache):
    """What is in a cache: kernels, and the C code that launches them."""
    return sorted(file.name for suffix in ("cubin", "so") for file in cache.rglob(f"*.{suffix}"))


def note(**found):
    print(json.dumps(found))  # noqa: T201 - for people, with -s
    if folder := os.environ.get("OUT"):
        with Path(folder, "compile_ahead.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_worker_has_nothing_left_to_compile(config, tmp_path):
    folder = Path(os.environ.get("GLLM_MODEL", tmp_path))
    if folder == tmp_path:
        (tmp_path / "config.json").write_text(json.dumps(config))
    apart, together = tmp_path / "apart", tmp_path / "together"
    (ahead_s,) = run(AHEAD, folder, apart)
    ahead = built(apart)
    (again_s,) = run(AHEAD, folder, apart)
    warm_start_s, warm_answers_s = run(SERVED, folder, apart)
    start = time.monotonic()
    start_s, answers_s = run(SERVED, folder, together)
    note(
        model=str(folder) if folder != tmp_path else config["model_type"],
        num_built=len(ahead),
        ahead_s=ahead_s,
        ahead_with_full_cache_s=again_s,
        start_with_full_cache_s=warm_start_s,
        answers_with_full_cache_s=warm_answers_s,
        start_s=start_s,
        answers_s=answers_s,
        process_s=round(time.monotonic() - start, 2),
    )
    left = built(apart)
    for name in ahead:
        left.remove(name)
    assert left == [], "compiled by the worker"
    assert ahead == built(together)
