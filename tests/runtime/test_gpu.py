"""The same code on GPUs, with NCCL in place of gloo: same answers, same decisions as on the CPU.

`pytest -m gpu tests/runtime/test_gpu.py`; what one machine said is kept in benchmarks/results/gpu_checks.json.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from twin.bodies import both, small_trace, words, written

from gllm.runtime.default_model.tasks import held_out_cases
from gllm.runtime.llm import LLM
from gllm.runtime.sampling_params import SamplingParams
from gllm.sim.cli import main as sim

NUM_GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=64)
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=32, logprobs=2)
LAYOUTS = [{}, {"pp": 2}, {"tp": 2}, {"pp": 2, "max_in_flight": 3}]


def answers(params, **options):
    cases = held_out_cases(48, 0)
    with LLM(dtype="float32", max_num_seqs=64, **options) as llm:
        start = time.perf_counter()
        outputs = llm.chat([list(case.messages) for case in cases], params, use_tqdm=False)
        note(f"{options or 'one device'}", seconds=round(time.perf_counter() - start, 2))
    return [output.outputs[0].token_ids for output in outputs]


def note(what, **found):
    """Keep what a run said, where a folder for it is named."""
    if folder := os.environ.get("OUT"):
        with Path(folder, "gpu_checks.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "device": torch.cuda.get_device_name(0), **found}) + "\n")


@pytest.fixture(scope="module")
def on_the_cpu():
    return answers(GREEDY, device="cpu")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_answers_are_those_of_the_cpu(layout, on_the_cpu):
    if NUM_GPUS < 2 and layout:
        pytest.skip("needs two GPUs")
    found = answers(GREEDY, device="cuda", **layout)
    same = sum(a == b for a, b in zip(found, on_the_cpu, strict=True))
    note(f"greedy {layout}", same=same, of=len(found))
    assert same == len(found)


@pytest.mark.parametrize("options", [{"attention_backend": "torch"}, {"cuda_graphs": False}], ids=str)
def test_kernels_and_graphs_change_no_answer(options, on_the_cpu):
    found = answers(GREEDY, device="cuda", **options)
    note(f"greedy {options}", same=sum(a == b for a, b in zip(found, on_the_cpu, strict=True)), of=len(found))
    assert found == on_the_cpu


@pytest.mark.parametrize(
    ("backend", "policy"),
    [("triton", "throttle"), ("flash", "throttle"), *(("triton", f"sarathi:token_budget={num}") for num in (16, 5, 1))],
)
def test_bfloat16_stays_close_to_float32(backend, policy):
    """Log-probabilities of the cases' own texts, beside those of the CPU in float32; small steps have own kernels."""
    if backend == "flash":
        pytest.importorskip("flash_attn")
    told = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    texts = [case.messages[-1]["content"] for case in held_out_cases(24, 1)]

    def logprobs(**options):
        with LLM(max_num_seqs=1 if policy.endswith("=1") else 4, policy=policy, **options) as llm:
            found = llm.generate(texts, told, use_tqdm=False)
        return torch.tensor(
            [entry.logprob for output in found for place in output.prompt_logprobs[1:] for entry in place.values()]
        )

    exact = logprobs(device="cpu", dtype="float32")
    close = logprobs(device="cuda", dtype="bfloat16", attention_backend=backend)
    error = ((close - exact).norm() / exact.norm()).item()
    note(f"bfloat16 {backend} {policy}", relative_error=round(error, 5), of=len(exact))
    assert error < 0.01


def test_drawn_tokens_depend_on_the_seed_alone():
    first, second = answers(DRAWN, device="cuda"), answers(DRAWN, device="cuda", policy="sarathi:token_budget=64")
    assert first == second


@pytest.mark.parametrize("pp", [1, 2])
def test_decisions_are_the_simulators(pp, tmp_path, capsys):
    if pp > NUM_GPUS:
        pytest.skip("needs two GPUs")
    argv = words(written(small_trace(seed=pp), tmp_path), "throttle", pp, num_blocks=40)
    real, simulated = both(argv, tmp_path / "run", capsys)
    note(f"decisions pp={pp}", real=real["decision_sha256"], simulated=simulated["decision_sha256"])
    assert real["decision_sha256"] == simulated["decision_sha256"]
    assert sim(["fidelity", str(tmp_path / "run"), "--decisions"]) == 0
