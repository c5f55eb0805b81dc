"""transformers' `generate` in static batches on one GPU, or on the CPU: what one gets without a serving engine.

Requests are sorted by their number of output tokens, the longest first, and cut into batches of `max_num_seqs` at
most, fewer where their padded keys and values would take more than half of the memory that the weights leave. A
batch's prompts are padded on the left to its longest; it runs until its longest answer is complete, and nobody takes
the place of those that are complete earlier. Only the tokens that were asked for are counted.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from engines import TEMPERATURE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from engines import EngineOptions

_CPU_CACHE_BYTES = 2 << 30


class TransformersEngine:
    """A model and its `generate`."""

    def __init__(self, options: EngineOptions) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._max_rows, shape = options.max_num_seqs, options.shape
        self._model = _load(options, self._device)
        free = torch.cuda.mem_get_info()[0] // 2 if self._device.type == "cuda" else _CPU_CACHE_BYTES
        self._max_tokens = free // (shape.kv_bytes_per_token * shape.num_layers)
        self._num_batches = 0

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], num_outputs: Sequence[int]) -> list[int]:
        """Answer all prompts, batch by batch."""
        counts = [0] * len(prompts)
        for batch in self._batches(prompts, num_outputs):
            self._num_batches += 1
            num_new = self._run([prompts[index] for index in batch], max(num_outputs[index] for index in batch))
            for index in batch:
                counts[index] = min(num_new, num_outputs[index])
        return counts

    def _run(self, prompts: list[list[int]], num_outputs: int) -> int:
        """Generate so many tokens after each prompt; the number of columns that came out."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self._device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        mask = torch.arange(width, device=self._device) >= width - lengths[:, None]
        done = self._model.generate(ids, attention_mask=mask.long(), generation_config=_sampling(num_outputs))
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return int(done.shape[1]) - width

    def _batches(self, prompts: Sequence[list[int]], num_outputs: Sequence[int]) -> Iterator[list[int]]:
        """Indices of the requests that run together."""
        batch: list[int] = []
        width = 0
        for index in sorted(range(len(prompts)), key=lambda number: -num_outputs[number]):
            wider = max(width, len(prompts[index]))
            longest = num_outputs[batch[0]] if batch else num_outputs[index]
            if batch and (len(batch) == self._max_rows or (len(batch) + 1) * (wider + longest) > self._max_tokens):
                yield batch
                batch, wider = [], len(prompts[index])
            batch.append(index)
            width = wider
        if batch:
            yield batch

    def describe(self) -> dict[str, Any]:
        """How many batches it took so far."""
        return {"num_batches": self._num_batches, "attention": self._model.config._attn_implementation}  # noqa: SLF001

    def close(self) -> None:
        """Give the memory back."""
        del self._model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load(options: EngineOptions, device: torch.device) -> Any:  # noqa: ANN401 - transformers' own
    dtype = getattr(torch, options.dtype)
    if options.load_format == "auto":
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, local_files_only=True).to(device).eval()
    config = AutoConfig.from_pretrained(options.model, local_files_only=True)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # nothing ends before its last token
    return model


def _sampling(num_outputs: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=num_outputs,
        min_new_tokens=num_outputs,
        eos_token_id=None,
        pad_token_id=0,
    )
