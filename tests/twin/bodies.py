"""One trace through both bodies: real workers on the CPU, and the simulator."""

import json
import random
import time
from pathlib import Path

from gllm.console.output import TRACE_NAME
from gllm.parallel import Parallel
from gllm.report.decision_log import LOG_NAME
from gllm.report.write import write_run
from gllm.runtime.cli import main as runtime
from gllm.runtime.client import EngineClient
from gllm.runtime.config import RuntimeConfig
from gllm.runtime.default_model import PATH
from gllm.runtime.engine.recording import unpack
from gllm.runtime.messages import Progress
from gllm.runtime.replay import as_seen, describe, requests_of, stamped
from gllm.sim.cli import main as sim
from gllm.trace import Trace, TraceOptions, TraceRequest, write_trace

BLOCK_SIZE = 4


def small_trace(seed, num_requests=28):
    """Chats of a few users: shared prefixes, short answers, lengths that do not fit the cache together."""
    lots = random.Random(seed)
    rows = []
    for number in range(num_requests):
        user, own = lots.randrange(4), 1000 * (number + 1)
        shared = [100 * user + place for place in range(lots.randint(1, 6))]
        ids = [*shared, *range(own, own + lots.randint(1, 4))]
        rows.append(
            TraceRequest(
                arrival_ns=number * 4_000_000,
                num_prompt_tokens=len(ids) * BLOCK_SIZE - lots.randint(0, 3),
                num_output_tokens=lots.randint(1, 30),
                max_tokens=lots.choice([None, 20, 40]),
                hash_ids=tuple(ids),
                hash_block_size=BLOCK_SIZE,
                priority=lots.randint(0, 2),
                deadline_ns=number * 4_000_000 + lots.randint(0, 200_000_000),
            )
        )
    return Trace(name="small", format="gllm", requests=rows)


def written(trace, folder):
    path = folder / "small.jsonl"
    write_trace(trace, path)
    return path


def words(trace, policy, pp, *, num_blocks, max_in_flight=0, burst=True):
    """A command line that both replays take."""
    made = ["replay", trace, "--policy", policy, "--pp", pp, "--block-size", BLOCK_SIZE, "--num-blocks", num_blocks]
    made += ["--max-in-flight", max_in_flight, "--model", PATH, "--quiet", "--json"]
    return [str(word) for word in [*made, *(["--arrivals", "burst"] if burst else [])]]


def summary_of(program, argv, capsys):
    capsys.readouterr()
    status = program(argv)
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


def both(argv, out, capsys):
    """Summaries of the real run, whose folder is `out`, and of the simulated one."""
    return summary_of(runtime, [*argv, "--out", str(out)], capsys), summary_of(sim, argv, capsys)


def fidelity(out):
    return sim(["fidelity", str(out), "--decisions"])


def with_aborts(trace, out, *, seed, num_aborts, **options):
    """A real run in which clients go away at odd moments; its folder is `out`, as a replay would write it."""
    out.mkdir()
    parallel = Parallel(pp=options.pop("pp", 1))
    config = RuntimeConfig(
        model=str(PATH), parallel=parallel, block_size=BLOCK_SIZE, record=str(out / LOG_NAME), **options
    )
    lots = random.Random(seed)
    with EngineClient(config) as client:
        client.wait_until_ready()
        start_ns = time.monotonic_ns()
        waves = _waves([stamped(each, start_ns) for each in requests_of(client, trace, temperature=0.0)], lots)
        doomed = lots.sample(range(len(trace.requests)), num_aborts)
        left = set(range(len(trace.requests)))
        while left:
            if waves:
                client.submit(waves.pop())
            if doomed and not waves:  # what has ended already is not aborted: the engine does not know it any more
                gone = doomed.pop()
                client.abort([gone])
                left.discard(gone)
            notice = client.receive(0.005)
            if isinstance(notice, Progress):
                left -= {delta.key for delta in notice.deltas if delta.finish_reason is not None}
        described = describe(config, client, trace, TraceOptions(source="small"), None, None)
        record = unpack(client.finish(), described)
    write_trace(as_seen(trace, config), out / TRACE_NAME)
    return write_run(Path(out), record)


def _waves(requests, lots):
    """Two or three submissions, the last one first."""
    cuts = sorted(lots.sample(range(1, len(requests)), 2))
    return [requests[cuts[1] :], requests[cuts[0] : cuts[1]], requests[: cuts[0]]]
