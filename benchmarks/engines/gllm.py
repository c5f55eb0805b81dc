"""gLLM through its offline API."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from engines import TEMPERATURE
from gllm.parallel import Parallel
from gllm.policy import format_policy, parse_policy
from gllm.runtime.config import RuntimeConfig
from gllm.runtime.llm import LLM
from gllm.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from engines import EngineOptions

_BUDGETS = {"sarathi": "token_budget", "prefill_first": "token_budget", "throttle": "max_prefill"}
"""The option of each policy that limits a step's prompt tokens; throttle's decodes come on top."""


class GllmEngine:
    """An engine process and its workers."""

    def __init__(self, options: EngineOptions) -> None:
        config = runtime_config(options, prefix_caching=False)
        self._policy = config.policy
        self._llm = LLM(config)

    def generate(self, prompts: Sequence[list[int]], num_outputs: Sequence[int]) -> list[int]:
        """Answer all prompts."""
        params = [
            SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=count, detokenize=False)
            for count in num_outputs
        ]
        answers = self._llm.generate(list(prompts), params, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]

    def describe(self) -> dict[str, Any]:
        """The policy as it is run, and what was preempted."""
        return {"policy": self._policy, "num_preemptions": self._llm.stats().num_preemptions}

    def close(self) -> None:
        """End the processes."""
        self._llm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def runtime_config(options: EngineOptions, *, prefix_caching: bool) -> RuntimeConfig:
    """A whole configuration; `options.extra` has the last word.

    Raises:
        ValueError: it has no such option, or one has a value of another type.
    """
    values: dict[str, Any] = {
        "model": options.model,
        "parallel": Parallel(pp=options.pp, tp=options.tp, ep=options.ep, pp_layers=options.pp_layers),
        "policy": with_budget(options.policy, options.max_num_batched_tokens, options.max_num_seqs),
        "max_in_flight": options.max_in_flight,
        "max_num_seqs": options.max_num_seqs,
        "max_model_len": options.max_model_len,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "prefix_caching": prefix_caching,
        "dtype": options.dtype,
        "load_format": options.load_format,
        "skip_tokenizer_init": True,
    }
    known = RuntimeConfig.__dataclass_fields__
    for name in options.extra:
        if name not in known or name in ("model", "parallel"):
            raise ValueError(f"--engine-option {name}: unknown to gllm; known: {', '.join(known)}")
    try:
        config = msgspec.convert(RuntimeConfig(**{**values, **options.extra}).to_json(), RuntimeConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"--engine-option: {error}") from None
    config.check()
    return config


def with_budget(spec: str, num_tokens: int, max_num_seqs: int) -> str:
    """A policy with so many tokens a step, unless its spec says how many itself.

    Raises:
        ValueError: no such policy.
    """
    parse_policy(spec)
    name, _, given = spec.partition(":")
    option = _BUDGETS.get(name)
    if option is None or re.search(rf"(^|,){option}=", given):
        return spec
    if name == "throttle":
        num_tokens = max(num_tokens - max_num_seqs, 32)
    return format_policy(parse_policy(f"{name}:{given},{option}={num_tokens}"))
