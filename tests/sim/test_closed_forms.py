"""The simulator against what queueing theory and arithmetic say."""

from bisect import bisect_right
from math import sqrt
from statistics import mean, stdev

import numpy as np
import pytest
from sim.costs import FixedCost
from sim.played import Played, arrival, play

from gllm.trace import parse_arrivals

NS = 1_000_000_000


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("num_chunks", [1, 2, 4])
def test_one_request_alone(num_stages, num_chunks):
    stage, hop, host, back, output = 1000, 70, 30, 11, 9
    cost = FixedCost(num_stages=num_stages, batch_ns=stage, hop_ns=hop, host_ns=host, return_ns=back)
    one = arrival(0, at=500, prompt=100 * num_chunks, output=output)
    record = play([one], policy="sarathi:token_budget=100", cost=cost)
    through = host + num_stages * stage + (num_stages - 1) * hop + back
    # As many chunks as stages follow each other; the next may only when the first is back.
    rounds, rest = divmod(num_chunks - 1, num_stages)
    prefill = rounds * through + rest * stage + through
    row = record.requests[0]
    assert row["scheduled_ns"] == 500
    assert row["first_token_ns"] == 500 + prefill
    assert row["finish_ns"] == 500 + prefill + (output - 1) * through
    assert row["num_output_tokens"] == output


def test_one_request_alone_costs_its_tokens():
    cost = FixedCost(batch_ns=1000, token_ns=3)
    record = play([arrival(0, prompt=50, output=4)], cost=cost)
    assert record.requests[0]["first_token_ns"] == 1000 + 50 * 3
    assert record.requests[0]["finish_ns"] == 1000 + 50 * 3 + 3 * (1000 + 3)


@pytest.mark.parametrize("policy", ["throttle", "sarathi:token_budget=128", "prefill_first", "orca"])
def test_a_saturated_single_stage_never_idles(policy):
    requests = [arrival(n, prompt=20 + n % 50, output=1 + n % 17) for n in range(500)]
    record = play(requests, policy=policy, cost=FixedCost(batch_ns=1000, token_ns=7), max_num_seqs=32)
    num_tokens = sum(20 + n % 50 + n % 17 for n in range(500))  # the prompt's last step samples the first output
    assert record.requests["finish_ns"].max() == 1000 * record.batches.size + 7 * num_tokens
    assert (record.stage_start_ns[1:] == record.stage_end_ns[:-1]).all()
    assert record.requests["num_output_tokens"].sum() == sum(1 + n % 17 for n in range(500))


def test_a_saturated_pipeline_is_as_fast_as_its_stages():
    # All decode, one group a stage: each stage ends a batch every 1000 ns, whatever the number of stages.
    requests = [arrival(n, prompt=1, output=400) for n in range(64)]
    record = play(requests, policy="throttle", cost=FixedCost(num_stages=4, batch_ns=1000))
    steady = record.stage_end_ns[200:1200, 3]
    assert set(np.diff(steady)) == {1000}


def test_littles_law():
    times = parse_arrivals("poisson:200").times(20_000, seed=3)
    requests = [arrival(n, at=at, prompt=40, output=1 + n % 20) for n, at in enumerate(times)]
    played = Played(requests, policy="throttle", cost=FixedCost(num_stages=2, batch_ns=2_000_000, token_ns=20_000))
    seen = []

    def look(env):  # an observer with a clock of its own counts who has come and who has left
        while env.now < times[-1]:
            seen.append(bisect_right(times, env.now) - played.recorder.num_ended)
            yield env.timeout(9_999_991)

    played.simulation.env.process(look(played.simulation.env))
    rows = played.run().requests
    rate = len(times) / times[-1]
    sojourn = (rows["finish_ns"] - rows["arrival_ns"]).mean()
    assert mean(seen) > 5
    assert mean(seen) == pytest.approx(rate * sojourn, rel=0.01)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_md1_queue(load):
    # Prompt and output of one token, one sequence at a time: a single server with constant service.
    service_ns, size, batches = 1_000_000, 20_000, 20
    waits = []
    for seed in range(3):
        times = parse_arrivals(f"poisson:{load * NS / service_ns}").times(size, seed)
        requests = (arrival(n, at=at, prompt=1, output=1) for n, at in enumerate(times))
        rows = play(requests, cost=FixedCost(batch_ns=service_ns), max_num_seqs=1).requests
        assert (rows["finish_ns"] - rows["scheduled_ns"] == service_ns).all()
        wait = (rows["scheduled_ns"] - rows["arrival_ns"])[size // 10 :]
        waits += [part.mean() for part in np.array_split(wait, batches)]
    expected = load * service_ns / (2 * (1 - load))  # Pollaczek and Khinchine
    half_width = 2.66 * stdev(waits) / sqrt(len(waits))  # Student's t, 59 degrees of freedom, 99 %
    assert half_width < 0.15 * expected, "too few requests to tell"
    assert abs(mean(waits) - expected) < half_width
