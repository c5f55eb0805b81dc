"""What does not fit is refused before a weight is read."""

import pytest
import torch

from gllm.runtime.config import RuntimeConfig
from gllm.runtime.default_model import PATH
from gllm.runtime.errors import StartError
from gllm.runtime.shard import Shard
from gllm.runtime.worker.memory import check_weights


@pytest.mark.parametrize(("num_blocks", "fits"), [(None, True), (100, True), (90_000_000, False)])
def test_a_cache_of_a_given_size_must_fit(num_blocks, fits):
    config = RuntimeConfig(model=str(PATH), num_blocks=num_blocks)
    shape = config.check().shape
    shard = Shard(layers=range(shape.num_layers))
    if fits:
        check_weights(shape, shard, config, 4, torch.device("cpu"))
    else:
        with pytest.raises(StartError, match=r"--num-blocks 90000000 takes .* lower it"):
            check_weights(shape, shard, config, 4, torch.device("cpu"))
