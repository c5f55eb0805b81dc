"""How many held-out cases a model answers, and by how much its choices are clear.

The model reads a case with its right answer: greedy decoding gives that very answer if and only if the right token is
the likeliest at each place of it. So one forward pass scores a batch, without decoding.
Legend: C cases, W width, V vocabulary.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gllm.runtime.default_model.corpus import IGNORED, document_arrays
from gllm.runtime.default_model.tasks import SCORED, draw_problem, held_out_cases
from gllm.runtime.default_model.tokenizer import END_OF_TEXT, IM_END, PAD, prompt_ids

if TYPE_CHECKING:
    from torch import nn

    Arrays = tuple[np.ndarray, np.ndarray]

CASES_AT_ONCE = 64
CLOSE = 1.0
"""Logits nearer than this might change places under other arithmetic."""


def score(model: nn.Module, num_cases: int, seed: int, device: str) -> dict[str, Any]:
    """Accuracy for each task, as a chat and as a line to complete; `close` is the share of answers with a near miss."""
    named = [
        (case.task, _document(prompt_ids(case.messages), case.answer, IM_END))
        for case in held_out_cases(num_cases, seed)
    ]
    named += _line_documents(num_cases // 4, seed)
    named.sort(key=lambda pair: len(pair[1][0]))  # alike lengths together: little padding
    margins: dict[str, list[float]] = {}
    for start in range(0, len(named), CASES_AT_ONCE):
        chunk = named[start : start + CASES_AT_ONCE]
        least_C = answer_margins(model, [document for _, document in chunk], device)
        for (task, _), margin in zip(chunk, least_C, strict=True):
            margins.setdefault(task, []).append(margin)
    return {task: _summary(margins[task]) for task in sorted(margins)}


def answer_margins(model: nn.Module, documents: list[Arrays], device: str) -> list[float]:
    """For each document: over its answer, the least lead of the right token's logit; below zero is a wrong answer."""
    width = max(len(tokens) for tokens, _ in documents)
    shape = len(documents), width
    tokens_CW, targets_CW = np.full(shape, PAD), np.full(shape, IGNORED)
    for row, (tokens, targets) in enumerate(documents):
        tokens_CW[row, : len(tokens)], targets_CW[row, : len(targets)] = tokens, targets
    aims_CW = torch.from_numpy(targets_CW).to(device)
    with torch.inference_mode():
        logits_CWV = model(torch.from_numpy(tokens_CW).to(device), use_cache=False).logits.float()
    aim_CW1 = aims_CW.clamp(min=0)[..., None]
    right_CW = logits_CWV.gather(-1, aim_CW1)[..., 0]
    other_CW = logits_CWV.scatter(-1, aim_CW1, -torch.inf).amax(-1)
    leads_CW = (right_CW - other_CW).masked_fill(aims_CW == IGNORED, torch.inf)
    leads: list[float] = leads_CW.amin(-1).tolist()
    return leads


def _line_documents(num_lines: int, seed: int) -> list[tuple[str, Arrays]]:
    rng = Random(f"held out lines {seed}")
    problems = [draw_problem(rng, SCORED[index % len(SCORED)], held_out=True) for index in range(num_lines)]
    return [
        (f"{each.task} line", _document([*each.line.encode()], f" {each.answer}", END_OF_TEXT)) for each in problems
    ]


def _document(prompt: list[int], answer: str, end: int) -> Arrays:
    return document_arrays(iter([(prompt, False), ([*answer.encode(), end], True)]))


def _summary(margins: list[float]) -> dict[str, Any]:
    num_right = sum(margin > 0 for margin in margins)
    num_close = sum(abs(margin) < CLOSE for margin in margins)
    return {
        "num_cases": len(margins),
        "accuracy": round(num_right / len(margins), 4),
        "close": round(num_close / len(margins), 4),
    }
