"""The recurrence and one process per stage say the same, to the last event, ties in time included."""

import pytest
import simpy
from sim.costs import FixedCost
from sim.played import POLICY_SPECS, Events, Played, tied_traffic

from gllm.gpu_clock import GpuClock, PowerLimit
from gllm.sim.cost import Load
from gllm.sim.pipeline import ProcessPipeline, recurrence

CLOCK = GpuClock(
    limits=(PowerLimit(tau_ns=200, slowdown=0.5, knee=0.0), PowerLimit(tau_ns=2000, slowdown=0.25, knee=0.5)),
    attention=0.0,
)
TINY = {"num_blocks": 60, "block_size": 4, "max_num_seqs": 24}


def played(pipeline, **options):
    log = Events()
    record = Played(tied_traffic(400), log=log, pipeline=pipeline, **options).run()
    return log.lines, record


@pytest.mark.parametrize(("num_stages", "extra"), [(1, 0), (2, 0), (4, 0), (8, 0), (1, 1), (4, 2)])
@pytest.mark.parametrize("policy", POLICY_SPECS)
def test_equal_event_logs_with_ties(policy, num_stages, extra):
    cost = FixedCost(num_stages=num_stages, batch_ns=10, hop_ns=10, host_ns=10, return_ns=10)
    options = {"policy": policy, "cost": cost, "max_in_flight": num_stages + extra, **TINY}
    lines, record = played(recurrence, **options)
    reference_lines, reference = played(ProcessPipeline, **options)
    assert lines == reference_lines
    for column in ("requests", "batches", "stage_start_ns", "stage_end_ns", "done_ns", "gaps", "num_discarded"):
        assert (getattr(record, column) == getattr(reference, column)).all()


@pytest.mark.parametrize("cost_ns", [{"token_ns": 1}, {"hop_ns": 0}, {"host_ns": 0, "return_ns": 0}, {"between_ns": 3}])
def test_equal_event_logs_without_a_delay_here_and_there(cost_ns):
    cost = FixedCost(**{"num_stages": 4, "batch_ns": 10, "hop_ns": 10, "host_ns": 10, "return_ns": 10, **cost_ns})
    options = {"policy": "throttle", "cost": cost, "max_in_flight": 5, **TINY}
    assert played(recurrence, **options)[0] == played(ProcessPipeline, **options)[0]


class ClockedCost(FixedCost):
    """Stages whose clocks lower with every token."""

    clock = CLOCK

    def load(self, work):
        num_tokens = work.num_prefill_tokens + work.num_decode_tokens
        times_ns = list(self.stage_ns(work))
        return Load(times_ns, [0.75 * time_ns for time_ns in times_ns], min(1.0, num_tokens / 64))


@pytest.mark.parametrize(("num_stages", "extra"), [(1, 0), (3, 0), (1, 1), (4, 2)])
@pytest.mark.parametrize("policy", POLICY_SPECS)
def test_equal_event_logs_with_clocks(policy, num_stages, extra):
    cost = ClockedCost(num_stages=num_stages, batch_ns=20, token_ns=2, hop_ns=5, between_ns=3, host_ns=10, return_ns=10)
    options = {"policy": policy, "cost": cost, "max_in_flight": num_stages + extra, **TINY}
    lines, record = played(recurrence, **options)
    reference_lines, reference = played(ProcessPipeline, **options)
    assert lines == reference_lines
    for column in ("requests", "batches", "stage_start_ns", "stage_end_ns", "done_ns", "gaps", "num_discarded"):
        assert (getattr(record, column) == getattr(reference, column)).all()
    times_ns = record.stage_end_ns - record.stage_start_ns
    tokens = record.batches["num_prefill_tokens"] + record.batches["num_decode_tokens"]
    assert (times_ns != (20 + 2 * tokens)[:, None]).any(), "what is recorded is what stages took"


@pytest.mark.parametrize("pipeline", [recurrence, ProcessPipeline])
def test_a_clock_by_hand(pipeline):
    # in a row, a gap of 2 between them, until they take half as long again; after a rest it is as fast as the first
    env = simpy.Environment()
    loads = [Load([100_000], [100_000.0], 1.0) for _ in range(30)]
    limit = PowerLimit(tau_ns=100_000, slowdown=0.5, knee=0.0)
    line = pipeline(env, 1, 0, lambda _: None, GpuClock(limits=(limit,), attention=0.0))
    for number, load in enumerate(loads):
        line.submit(10**8 * (number == 29), load.stage_ns, 0, 2, 0, -1, load)
    env.run()
    times_ns = [load.stage_ns[0] for load in loads]
    assert times_ns[0] == times_ns[29] == pytest.approx(100_000 * (1 + 0.5 * 0.368), rel=0.002)
    assert times_ns[20:29] == [pytest.approx(150_000, abs=2)] * 9


@pytest.mark.parametrize("pipeline", [recurrence, ProcessPipeline])
def test_by_hand(pipeline):
    # stage 0: batch 0 0-5, batch 1 5-6; stage 1 after a hop of 1: batch 0 6-8, batch 1 8-11;
    # batch 2 needs the tokens of batch 1, which are back at 111
    env = simpy.Environment()
    seen = []
    line = pipeline(env, 2, 4, lambda _: seen.append((env.now, list(ends[len(seen)]))), None)
    ends = [line.submit(0, costs, 1, 0, 100, after, None) for costs, after in [((5, 2), -1), ((1, 3), -1), ((1, 1), 1)]]
    env.run()
    assert seen == [(108, [5, 8]), (111, [6, 11]), (214, [112, 114])]


@pytest.mark.parametrize("pipeline", [recurrence, ProcessPipeline])
def test_a_gap_lies_between_steps_alone(pipeline):
    # stage 0 starts at once, then 2 after each end; stage 1 waits for data longer than for the gap, then not
    env = simpy.Environment()
    seen = []
    line = pipeline(env, 2, 0, lambda _: seen.append(list(ends[len(seen)])), None)
    ends = [line.submit(0, costs, 1, 2, 100, -1, None) for costs in [(5, 2), (1, 9), (1, 1)]]
    env.run()
    assert seen == [[5, 8], [8, 19], [11, 22]]
