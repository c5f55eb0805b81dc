"""What transformers makes of the same prompts."""

from __future__ import annotations

import torch

from gllm import SamplingParams


def greedy(num_tokens, **options):
    """Greedy, to this very length."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True} | options)


def token_ids(outputs):
    """The tokens of every answer."""
    return [answer.token_ids for output in outputs for answer in output.outputs]


@torch.inference_mode()
def logits_of(model, tokens):
    """Of every place of one sequence, [T, V]."""
    return model(torch.tensor([tokens])).logits[0]


@torch.inference_mode()
def assert_greedy(model, prompts, answers, num_tokens):
    """Every token is the likeliest in transformers' eyes after all before it, so its generate gives the same.

    One pass for all: what stands right of a sequence cannot change it.
    """
    assert [len(answer) for answer in answers] == [num_tokens] * len(prompts)
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, whole))
    logits = model(torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in whole])).logits
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        best = logits[row, len(prompt) - 1 : len(prompt) + num_tokens - 1].argmax(-1)
        assert best.tolist() == answer, f"prompt {row} of {len(prompt)} tokens"
