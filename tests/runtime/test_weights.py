"""Loading: whole or sharded files, only one rank's slices, and one clear line for whatever is wrong with a folder."""

from __future__ import annotations

import json

import pytest
import torch
from gllm_kernels.routing import route
from runtime.stepping import Engine, load_stages, on_ranks, random_prompts
from runtime.tiny_models import VOCAB_SIZE, make
from safetensors.torch import load_file, save_file

from gllm.runtime.model_config import load_model_config
from gllm.runtime.models import MODELS
from gllm.runtime.shard import Shard
from gllm.runtime.weights import fill_with_dummy_weights, load_weights, wanted_tensors

PROMPT = random_prompts([20], VOCAB_SIZE)[0]


def logits(stages):
    return Engine(stages, [PROMPT], max_len=len(PROMPT)).step([(0, len(PROMPT))])[0][0]


def change(folder, **changes):
    """Rewrite the one file of a checkpoint: a name to a tensor, or to None to take it out."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors")


def spread(folder):
    """Cut a checkpoint into a file for each layer and one for the rest, with an index."""
    weights = load_file(folder / "model.safetensors")
    weight_map = {name: f"{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors" for name in weights}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_checkpoint_is_the_whole_one(tmp_path):
    for name in ("one", "many"):
        make("qwen3-moe", tmp_path / name, max_shard_size="40KB" if name == "many" else "1GB")
    assert not (tmp_path / "many" / "model.safetensors").exists()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert torch.equal(logits(load_stages(tmp_path / "many")), logits(load_stages(tmp_path / "one")))


def test_a_stage_reads_only_the_files_of_its_layers(tmp_path):
    make("llama", tmp_path)
    config = load_model_config(tmp_path)
    spread(tmp_path)
    (tmp_path / "2.safetensors").write_bytes(b"this is no safetensors file")
    first = MODELS[config.architecture](config, Shard(layers=range(2), is_last=False))
    load_weights(first, tmp_path)
    second = MODELS[config.architecture](config, Shard(layers=range(2, 3), is_first=False))
    with pytest.raises(ValueError, match=r"2\.safetensors: cannot be read as safetensors"):
        load_weights(second, tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen2-moe", "chatglm"])
def test_two_ranks_read_every_cut_tensor_once(name, tmp_path):
    make(name, tmp_path)

    def rank(group):
        (stage,) = load_stages(tmp_path, group=group)
        return [(each.name, each.full_shape, each.target.numel()) for each in wanted_tensors(stage)]

    ranks = on_ranks(2, rank)
    sizes = load_file(tmp_path / "model.safetensors")
    for name_ in {each[0] for each in ranks[0]}:
        read = [sum(count for other, _, count in each if other == name_) for each in ranks]
        whole = sizes[name_].numel()
        replicated = "norm" in name_ or name_.endswith(("gate.weight", "shared_expert_gate.weight"))
        assert sum(read) == (2 * whole if replicated else whole), name_


def test_with_fewer_kv_heads_than_ranks_neighbours_hold_the_same_head(tmp_path):
    make("llama", tmp_path)

    def rank(group):
        (stage,) = load_stages(tmp_path, group=group)
        qkv = stage.layers["0"].attention.qkv
        return qkv.weight.split(qkv.sizes)[1]

    keys = on_ranks(4, rank)
    assert torch.equal(keys[0], keys[1])
    assert torch.equal(keys[2], keys[3])
    assert not torch.equal(keys[1], keys[2])


def test_progress_counts_every_tensor(tmp_path):
    make("llama", tmp_path)
    config = load_model_config(tmp_path)
    stage = MODELS[config.architecture](config, Shard(layers=range(3)))
    calls = []
    load_weights(stage, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n + 1, len(calls)) for n in range(len(load_file(tmp_path / "model.safetensors")))]


def test_harmless_extras_are_ignored(tmp_path):
    model = make("llama-tied", tmp_path)
    before = logits(load_stages(tmp_path))
    embedding = model.get_input_embeddings().weight.detach().clone()
    change(tmp_path, **{"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(logits(load_stages(tmp_path)), before)


WRONG = {
    "missing": ({"model.norm.weight": None}, r"no tensor 'model\.norm\.weight'"),
    "missing head": ({"lm_head.weight": None}, r"no tensor 'lm_head\.weight'"),
    "shape": (
        {"model.layers.1.mlp.up_proj.weight": torch.ones(3, 4)},
        r"'model\.layers\.1\.mlp\.up_proj\.weight' has shape \[3, 4\].* calls for \[48, 32\]",
    ),
    "unknown": ({"model.extra.weight": torch.ones(2)}, r"'model\.extra\.weight' has no place in LlamaForCausalLM"),
    "a bias the config denies": (
        {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
        r"'model\.layers\.0\.self_attn\.q_proj\.bias' has no place",
    ),
    "a layer too many": ({"model.layers.3.input_layernorm.weight": torch.ones(32)}, r"model\.layers\.3\..*no place"),
    "quantised": ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, r"'model\.norm\.weight' is I8; quantised"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_tensor_is_one_line(wrong, tmp_path):
    changes, message = WRONG[wrong]
    make("llama", tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_stages(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path):
    make("llama", tmp_path)
    (stage,) = load_stages(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        load_weights(stage, tmp_path / "nowhere")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*convert"):
        load_weights(stage, tmp_path / "bin")
    spread(tmp_path)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1\.safetensors: listed in .* but missing"):
        load_weights(stage, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index"):
        load_weights(stage, tmp_path)


def dummy(stage, _folder):
    fill_with_dummy_weights(stage)


@pytest.mark.parametrize(("name", "tp", "ep", "pp"), [("chatglm", 2, 1, 1), ("qwen2-moe", 2, 2, 3), ("qwen2", 4, 1, 2)])
def test_dummy_weights_are_the_same_however_the_model_is_cut(name, tp, ep, pp, tmp_path):
    make(name, tmp_path)
    expected = logits(load_stages(tmp_path, fill=dummy))
    assert 0.1 < expected.std() < 10
    for each in on_ranks(tp, lambda group: logits(load_stages(tmp_path, group=group, ep=ep, pp=pp, fill=dummy))):
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


def test_dummy_weights_look_like_weights_and_follow_the_seed(tmp_path):
    make("llama", tmp_path)
    (stage,) = load_stages(tmp_path, fill=dummy)
    weight = stage.layers["1"].mlp.gate_up.weight
    assert weight.mean().abs() < 0.02
    assert weight.std() * 32**0.5 == pytest.approx(1.0, abs=0.05)
    assert len(weight.unique()) > 0.99 * weight.numel()
    assert not torch.equal(weight, stage.layers["0"].mlp.gate_up.weight)
    (other,) = load_stages(tmp_path, fill=lambda stage, _: fill_with_dummy_weights(stage, seed=1))
    assert not torch.equal(weight, other.layers["1"].mlp.gate_up.weight)


def test_dummy_weights_send_a_prompt_to_all_experts(tmp_path, monkeypatch):
    """As a trained router does; not each of its tokens to the same few."""
    make("qwen3-moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 24, "hidden_size": 128, "vocab_size": 512, "num_experts": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": None}))
    chosen = []

    def seen(*args, **options):
        weights, ids = route(*args, **options)
        chosen.append(ids.flatten().bincount(minlength=64))
        return weights, ids

    monkeypatch.setattr("gllm.runtime.layers.moe.route", seen)
    (prompt,) = random_prompts([192], 512)
    Engine(load_stages(tmp_path, fill=dummy), [prompt], max_len=192).step([(0, 192)])
    visits = torch.stack(chosen)  # 6 of each expert in the mean
    assert visits.shape == (24, 64)
    assert (visits > 0).float().mean() > 0.98
    assert visits.max() < 32


def test_a_width_the_ranks_cannot_share_is_one_line(tmp_path):
    make("qwen2-moe", tmp_path)
    config = load_model_config(tmp_path)

    def rank(group):
        return MODELS[config.architecture](config, Shard(layers=range(3), tp_rank=group.rank, tp_size=3, group=group))

    with pytest.raises(ValueError, match=r"shared_expert_intermediate_size 40 cannot be cut into 3 equal"):
        on_ranks(3, rank)
