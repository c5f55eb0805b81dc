"""Philox: equal to the published vectors and to Triton's generator; its noise is Gumbel noise and never infinite."""

# ruff: noqa: N806 - tensors carry their shape in their name

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gllm_kernels.philox import gumbel, philox, uniform

torch.set_num_threads(1)

WORD = 0xFFFFFFFF


def philox_in_integers(counter, key):
    """The paper's figure, written with Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def signed(number):
    return (number + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that the Random123 library is tested with
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_integer_version_gives_the_known_answers(counter, key, words):
    assert philox_in_integers(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
def test_tensors_give_what_integers_give(seed):
    counters, highs = [0, 1, 2, 77, 151_935, WORD], [0, 1, 4095, WORD]
    got = philox(torch.tensor([[signed(seed)]]), torch.tensor([counters]), torch.tensor(highs)[:, None])
    expected = [
        [philox_in_integers((counter, high, 0, 0), (seed & WORD, seed >> 32)) for counter in counters] for high in highs
    ]
    assert torch.stack(got, dim=-1).tolist() == [[list(words) for words in row] for row in expected]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_words_are_those_of_triton_and_of_our_kernels():
    seeds, steps, firsts, num = [0, 12345, -3, 2**62 + 11], [0, 1, 1000, 2**31 + 5], [0, 37_900], 32
    script = Path(__file__).with_name("triton_rand.py")
    run = subprocess.run(  # noqa: S603
        [sys.executable, str(script), json.dumps([seeds, steps, firsts, num])],
        env=os.environ if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = []
    for seed in seeds:
        for step in steps:
            for first in firsts:
                words = philox(torch.tensor([seed]), torch.arange(first, first + num), torch.tensor([step]))
                as_int32 = [word.to(torch.int32).tolist() for word in words]
                expected.append([as_int32, as_int32, uniform(words[0]).tolist()])
    got = json.loads(run.stdout)
    assert [each[:2] for each in got] == [each[:2] for each in expected]
    got_uniform, expected_uniform = (torch.tensor([each[2] for each in side]) for side in (got, expected))
    assert torch.allclose(got_uniform, expected_uniform, rtol=2**-22, atol=0)  # a product and a sum, fused or not


def test_a_tokens_noise_is_its_word_of_its_group():
    noise_V = gumbel(torch.tensor([7]), torch.tensor([3]), 4 * 9 + 2)[0]
    words = torch.stack(philox(torch.tensor([7]), torch.arange(10), torch.tensor([3])), dim=-1).flatten()
    expected_V = -(-(-uniform(words)).log1p()).log()
    assert noise_V.tolist() == expected_V[: 4 * 9 + 2].tolist()


def test_uniforms_are_spread_evenly_over_zero_to_one():
    u = uniform(torch.cat(philox(torch.tensor([7]), torch.arange(50_000), torch.tensor([3]))))
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_square = ((counts - 2000) ** 2 / 2000).sum().item()
    assert 50 < chi_square < 165  # 99 degrees of freedom; beyond either end once in 25,000


def test_the_noise_has_gumbels_mean_and_variance():
    noise = gumbel(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 5, 6]), 100_000)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)


@pytest.mark.parametrize("word", [0, WORD, 2**31 - 1, 2**31, 1])
def test_no_word_makes_infinite_noise(word, monkeypatch):
    monkeypatch.setattr("gllm_kernels.philox.philox", lambda _, counter, __: (torch.full_like(counter, word),) * 4)
    assert gumbel(torch.tensor([0]), torch.tensor([0]), 1).abs().item() < 25
    assert 0 < uniform(torch.tensor([word])).item() < 1


def test_noise_differs_by_seed_by_step_and_by_token():
    noise = gumbel(torch.tensor([5, 5, 6]), torch.tensor([0, 1, 0]), 1000)
    assert len(noise.unique()) > 2990


def test_a_rows_noise_does_not_depend_on_the_batch():
    seeds, steps = torch.arange(40) * 977, torch.arange(40) % 7
    alone = torch.cat([gumbel(seeds[[row]], steps[[row]], 333) for row in range(40)])
    assert torch.equal(alone, gumbel(seeds, steps, 333))
