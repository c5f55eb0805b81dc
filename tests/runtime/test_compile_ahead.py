"""What is compiled while workers load is what they will launch; and whatever fails there holds nobody up."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gllm.runtime.config import RuntimeConfig
from gllm.runtime.worker import compile_ahead, first_steps, graphs, stage

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 30001,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
DENSE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **SHAPE}
SPARSE = {
    **SHAPE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
}
COMMON = {
    "_lay_out",
    "_rms_norm_kernel",
    "_one_row_kernel",
    "_few_rows_kernel",
    "_decode_kernel",
    "_chunk_kernel",
    "_best_of_part",
    "_floor_of_row",
}


def diverted(*arguments, **environment):
    """What a process of its own finds, which has Triton's compiler and no GPU."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    here = Path(__file__).parent.parent
    done = subprocess.run(  # noqa: S603 - our own module
        [sys.executable, "-m", "runtime.diverted", *arguments],
        cwd=here,
        env={**kept, "PYTHONPATH": os.pathsep.join([str(here), *sys.path]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("config", "layout", "options", "kernels"),
    [
        (DENSE, {}, {}, {"_silu_and_mul_kernel"}),
        (DENSE, {"pp": 2}, {"max_num_seqs": 2}, {"_silu_and_mul_kernel"}),
        (DENSE, {}, {"cuda_graphs": False, "max_num_seqs": 32}, {"_silu_and_mul_kernel"}),
        (DENSE, {}, {"cuda_graphs": False, "max_num_seqs": 1}, {"_silu_and_mul_kernel"}),
        (SPARSE, {"pp": 2, "tp": 2, "ep": 2}, {}, {"_silu_and_mul_kernel", "_product_kernel", "_all_reduce_kernel"}),
    ],
    ids=["dense", "few slots", "eager", "eager and alone", "sparse"],
)
def test_the_first_steps_launch_all_that_traffic_launches(config, layout, options, kernels, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = diverted("missed", str(tmp_path), json.dumps(layout), json.dumps(options))
    assert set(found["first"]) >= COMMON | kernels
    assert found["missed"] == []
    assert not found["imports_dynamo"]


def test_kernels_launched_early_wait_before_they_touch_what_a_step_computes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    found = diverted("early", str(tmp_path))
    names = {name for name, _ in found}
    assert names == {
        "_rms_norm_kernel", "_one_row_kernel", "_few_rows_kernel", "_norm_rotate_cache_kernel", "_decode_kernel",
    }  # fmt: skip
    for name, does in found:
        before = does[: does.index("griddepcontrol.wait")]
        assert "griddepcontrol.launch_dependents" in does, name
        touched = [each for each in before if "launch_dependents" not in each]
        assert len(does) > len(before) + 1, name
        # The plan of a step is older than the first kernel that may start early.
        assert touched == ["ld.global"] * 3 if name == "_decode_kernel" else touched == [], (name, touched)


def test_torchs_compiler_is_not_imported_and_works_afterwards():
    assert diverted("later") == {"imported": False, "made": [1.0, 1.0]}


def test_functions_forget_how_they_were_hidden_from_torchs_compiler(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.delitem(vars(torch), "_dynamo", raising=False)  # to look it up otherwise would import it

    def function():
        return 1

    with first_steps.without_device():
        assert torch._compile._disable_dynamo(function)() == 1
        assert hasattr(function, "__dynamo_disable")
    assert not hasattr(function, "__dynamo_disable")
    assert "torch._dynamo" not in sys.modules


def test_torchs_compiler_stays_where_it_is_imported_already(monkeypatch):
    its_own = object()
    monkeypatch.setitem(sys.modules, "torch._dynamo", its_own)
    with first_steps.without_device():
        assert sys.modules["torch._dynamo"] is its_own
    assert sys.modules["torch._dynamo"] is its_own


def test_what_a_graph_would_capture_is_launched_once():
    launched = []
    with first_steps.without_device():
        graph = stage.GraphPool().capture(lambda: launched.append(1))
        graph.replay()
    assert launched == [1]
    assert stage.GraphPool is graphs.GraphPool


def test_a_launch_finds_in_tritons_cache_what_was_compiled_for_it(tmp_path):
    found = diverted("hits", TRITON_CACHE_DIR=str(tmp_path))
    assert found == {"_rms_norm_kernel": True, "_silu_and_mul_kernel": True, "_floor_of_row": True}


def test_a_mark_is_of_a_model_its_options_and_a_gpu(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    config, gpu = RuntimeConfig(model=str(tmp_path)), {"arch": 90, "num_multiprocessors": 132}
    mark = compile_ahead.mark_of(config, **gpu)
    assert mark == compile_ahead.mark_of(RuntimeConfig(model=str(tmp_path)), **gpu)
    others = {
        compile_ahead.mark_of(config, **gpu | {"arch": 80}),
        compile_ahead.mark_of(config, **gpu | {"num_multiprocessors": 114}),
        compile_ahead.mark_of(replace(config, block_size=32), **gpu),
    }
    (tmp_path / "config.json").write_text(json.dumps(DENSE | {"intermediate_size": 1024}))
    others.add(compile_ahead.mark_of(config, **gpu))
    assert len(others - {mark}) == 4


def test_without_processes_to_be_had_nothing_is_compiled(monkeypatch):
    def refuse(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compile_ahead.multiprocessing.get_context("fork"), "Pipe", refuse)
    compile_ahead.compile_ahead(RuntimeConfig(model="nowhere")).wait()


def test_without_gpus_nothing_is_compiled():
    before = multiprocessing.active_children()
    compile_ahead.compile_ahead(RuntimeConfig(model="nowhere", device="cpu")).wait()
    assert multiprocessing.active_children() == before


def test_what_fails_ahead_holds_nobody_up_and_says_nothing(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("GLLM_TRACEBACK", raising=False)
    start = time.monotonic()
    compile_ahead.compile_ahead(RuntimeConfig(model="nowhere")).wait()  # no such folder, and here no GPU
    assert time.monotonic() - start < compile_ahead.PATIENCE_S / 2
    assert capfd.readouterr() == ("", "")


def test_it_is_waited_for_until_the_last_compiler_has_ended(tmp_path):
    ended, working = multiprocessing.Pipe(duplex=False)
    done = tmp_path / "done"

    def compile_slowly():
        time.sleep(0.5)
        done.touch()

    pid = os.fork()
    if not pid:
        compilers = compile_ahead.Compilers(2)
        compilers.submit(lambda: 1 / 0)
        compilers.submit(compile_slowly)
        compilers.join()
        os._exit(0)
    working.close()
    compile_ahead.Ahead(ended).wait()
    assert done.exists()
    ended.close()
    os.waitpid(pid, 0)


def test_the_first_compiler_waits_for_what_all_of_them_need(monkeypatch):
    events = []
    monkeypatch.setattr(compile_ahead.gc, "disable", lambda: None)
    monkeypatch.setattr(compile_ahead.sys, "setswitchinterval", lambda _: None)
    monkeypatch.setattr(compile_ahead, "_load_compiler", lambda: (time.sleep(0.2), events.append("loaded")))
    monkeypatch.setattr(compile_ahead, "divert_launches", lambda on_new, **_: on_new(None, ""))
    monkeypatch.setattr(compile_ahead, "take_first_steps", lambda _: events.append("stepped"))
    monkeypatch.setattr(compile_ahead.Compilers, "submit", lambda *_: events.append("forked"))
    compile_ahead.compile_first_steps(RuntimeConfig(model="nowhere"), arch=90)
    assert events == ["forked", "loaded", "forked", "stepped"]  # C code needs nothing else


@pytest.mark.parametrize(("cores", "workers", "most"), [(1, 1, 2), (16, 1, 14), (16, 8, 7), (192, 8, 183)])
def test_workers_and_who_goes_ahead_keep_their_cores(cores, workers, most, monkeypatch):
    monkeypatch.setattr(compile_ahead, "_num_cores", lambda: cores)
    assert compile_ahead._most_at_once(workers) == most


def test_so_many_compile_at_once(tmp_path):
    compilers = compile_ahead.Compilers(2)
    for number in range(5):
        compilers.submit((tmp_path / str(number)).touch)
        assert len(compilers.running) <= 2
    compilers.join()
    assert len(list(tmp_path.iterdir())) == 5
