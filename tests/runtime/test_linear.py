"""Who adds to the residual: a RowLinear of few rows whose output needs no sum over ranks, else the norm after it."""

from types import SimpleNamespace

import pytest
import torch

from gllm.runtime.layers import linear
from gllm.runtime.layers.linear import RowLinear
from gllm.runtime.layers.sharded import Placement
from gllm.runtime.shard import Shard


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("is_few", [True, False])
def test_the_residual_is_added_once(adds, tp_size, is_few, monkeypatch):
    monkeypatch.setattr(linear, "takes", lambda *_: is_few)
    group = SimpleNamespace(rank=0, size=tp_size, all_reduce=lambda out: tp_size * out)  # as if all ranks were alike
    place = Placement(
        shard=Shard(layers=range(1), tp_size=tp_size, group=group), dtype=torch.float32, device=torch.device("cpu")
    )
    layer = RowLinear(6, 4, bias=False, adds=adds, place=place, what="columns")
    layer.weight.normal_()
    x, residual = torch.randn(3, 6 // tp_size), torch.randn(3, 4)
    out, left = layer(x, residual)
    assert (out is None) == (adds and is_few and tp_size == 1)
    whole = left if out is None else left + out
    torch.testing.assert_close(whole, residual + tp_size * (x @ layer.weight.T))
