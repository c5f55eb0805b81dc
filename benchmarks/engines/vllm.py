"""vLLM through its offline API."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from engines import TEMPERATURE

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams  # after what it reads from the environment

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from engines import EngineOptions


class VllmEngine:
    """vLLM with its own defaults, but for the limits that all engines share."""

    def __init__(self, options: EngineOptions) -> None:
        if options.pp_layers is not None:
            os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, options.pp_layers))
        if options.ep not in (1, options.tp):
            raise ValueError(f"--ep {options.ep}: vLLM spreads experts over all of --tp {options.tp}, or none")
        limits: dict[str, Any] = {
            "load_format": options.load_format,
            "skip_tokenizer_init": True,
            "dtype": options.dtype,
            "max_model_len": options.max_model_len,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "enable_prefix_caching": False,
            "pipeline_parallel_size": options.pp,
            "tensor_parallel_size": options.tp,
            "enable_expert_parallel": options.ep > 1,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
        }
        self._llm = LLM(options.model, **{**limits, **options.extra})

    def generate(self, prompts: Sequence[list[int]], num_outputs: Sequence[int]) -> list[int]:
        """Answer all prompts."""
        params = [
            SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=count, detokenize=False)
            for count in num_outputs
        ]
        answers = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]

    def describe(self) -> dict[str, Any]:
        """Nothing that its options do not say."""
        return {}

    def close(self) -> None:
        """It ends with this process; its memory is free only then."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
