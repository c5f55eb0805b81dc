"""`replay`: a trace in real time against the real engine; the same folder as the simulator's comes out."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from gllm.console.options import trace_options
from gllm.console.output import RUN_FILES, TRACE_NAME, staged
from gllm.console.progress import show_progress, tell_seldom
from gllm.console.runs import read_trace, show_run, tell
from gllm.report.decision_log import LOG_NAME
from gllm.runtime.messages import NewRequest, Progress, Refused
from gllm.runtime.options import runtime_config
from gllm.runtime.prompts import synthesise
from gllm.runtime.sampling_params import SamplingParams
from gllm.runtime.versions import versions

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from gllm.report.record import RunRecord
    from gllm.runtime.client import EngineClient
    from gllm.runtime.config import RuntimeConfig
    from gllm.trace import Trace, TraceOptions, TraceRequest

    Summary = dict[str, Any]

_PATIENCE_S = 1.0


def replay(args: Namespace) -> int:
    """Play a trace, write its report, print its table; return the exit status."""
    config = runtime_config(args, record="")
    config.check()
    trace = _numbered(read_trace(args, trace_options(args)), args.speed)
    if args.out is None:
        from gllm.report.metrics import summarize  # noqa: PLC0415 - pandas, once all is done

        record = _play(args, config, trace)
        summary = summarize(record, slo_ttft_s=args.slo_ttft, slo_tpot_s=args.slo_tpot)
    else:
        with staged(Path(args.out), RUN_FILES) as folder:
            summary = _written(args, config, trace, folder)
    if summary["num_rejected"]:
        tell(args, [f"{summary['num_rejected']:,} requests rejected: longer than the model or the whole KV cache"])
    show_run(args, summary)
    return 0


def _written(args: Namespace, config: RuntimeConfig, trace: Trace, folder: Path) -> Summary:
    from gllm.report.write import write_run  # noqa: PLC0415
    from gllm.trace import write_trace  # noqa: PLC0415

    record = _play(args, replace(config, record=str(folder.absolute() / LOG_NAME)), trace)
    write_trace(as_seen(trace, config), folder / TRACE_NAME, description="as the engine saw it")
    return write_run(folder, record, slo_ttft_s=args.slo_ttft, slo_tpot_s=args.slo_tpot)


def _numbered(trace: Trace, speed: float) -> Trace:
    """Arrivals `speed` times as fast, and block ids small enough for every message: equal ones stay equal."""
    numbers: dict[int, int] = {}

    def renamed(row: TraceRequest) -> TraceRequest:
        assert row.arrival_ns is not None, "load_trace gives every request a time"
        arrival_ns = round(row.arrival_ns / speed)
        deadline_ns = None if row.deadline_ns is None else row.deadline_ns + arrival_ns - row.arrival_ns
        ids = tuple(numbers.setdefault(block, len(numbers)) for block in row.hash_ids)
        return replace(row, arrival_ns=arrival_ns, deadline_ns=deadline_ns, hash_ids=ids)

    return replace(trace, requests=[renamed(row) for row in trace.requests])


def as_seen(trace: Trace, config: RuntimeConfig) -> Trace:
    """The trace with the engine's own block hashes."""
    rows = [
        replace(row, hash_ids=tuple(_hashes(row, config)), hash_block_size=config.block_size) for row in trace.requests
    ]
    return replace(trace, requests=rows)


def _hashes(row: TraceRequest, config: RuntimeConfig) -> list[int]:
    return list(row.block_hashes(config.block_size)) if config.prefix_caching and row.hash_ids else []


def _play(args: Namespace, config: RuntimeConfig, trace: Trace) -> RunRecord:
    from gllm.runtime.client import EngineClient  # noqa: PLC0415 - after the mistakes that need no engine
    from gllm.runtime.engine.recording import unpack  # noqa: PLC0415

    with EngineClient(config) as client:
        client.wait_until_ready(tell_seldom(quiet=args.quiet))
        player = _Player(client, len(trace.requests))
        watching = show_progress(player.num_requests, lambda: player.num_ended, doing="replaying")
        with nullcontext() if args.quiet else watching:
            player.play(requests_of(client, trace, temperature=args.temperature))
        columns = client.finish()
        assert columns is not None, "the engine keeps a record"
        described = describe(config, client, trace, trace_options(args), args.slo_ttft, args.slo_tpot)
        return unpack(columns, described)


@dataclass(slots=True)
class _Player:
    """Submits every request when it is due, and counts those that ended."""

    client: EngineClient
    num_requests: int
    num_ended: int = 0

    def play(self, requests: Iterator[NewRequest]) -> None:
        """Until every request has ended. Those of one time go together, so that one turn sees them all.

        Each time's are written before they are due; the clock starts once the first ones are.
        """
        groups = (list(group) for _, group in groupby(requests, key=lambda request: request.arrival_ns))
        following = next(groups, None)
        start_ns = time.monotonic_ns()
        while self.num_ended < self.num_requests:
            left_s = _PATIENCE_S if following is None else _seconds_until(start_ns + following[0].arrival_ns)
            if following is not None and left_s <= 0:
                self.client.submit([stamped(request, start_ns) for request in following])
                following = next(groups, None)
            else:
                self._listen(min(left_s, _PATIENCE_S))

    def _listen(self, timeout_s: float) -> None:
        notice = self.client.receive(timeout_s)
        if isinstance(notice, Progress):
            self.num_ended += sum(delta.finish_reason is not None for delta in notice.deltas)
        elif isinstance(notice, Refused):
            self.num_ended += 1


def stamped(request: NewRequest, start_ns: int) -> NewRequest:
    """A request whose times are of the trace, on the clock whose time `start_ns` is the trace's 0."""
    deadline_ns = None if request.deadline_ns is None else start_ns + request.deadline_ns
    return msgspec.structs.replace(request, arrival_ns=start_ns + request.arrival_ns, deadline_ns=deadline_ns)


def requests_of(client: EngineClient, trace: Trace, *, temperature: float) -> Iterator[NewRequest]:
    """The trace's requests at the trace's times, each written when it is asked for."""
    vocab_size = client.model.shape.vocab_size
    for number, row in enumerate(trace.requests):
        assert row.arrival_ns is not None
        yield NewRequest(
            key=number,
            prompt_token_ids=synthesise(row, number, vocab_size),
            params=SamplingParams(
                temperature=temperature, ignore_eos=True, max_tokens=row.max_tokens, detokenize=False
            ),
            seed=number,
            arrival_ns=row.arrival_ns,
            priority=row.priority,
            deadline_ns=row.deadline_ns,
            block_hashes=_hashes(row, client.config),
            num_output_tokens=row.num_output_tokens,
        )


def _seconds_until(time_ns: int) -> float:
    return (time_ns - time.monotonic_ns()) / 1e9


def describe(  # noqa: PLR0917 - all that a run was
    config: RuntimeConfig,
    client: EngineClient,
    trace: Trace,
    options: TraceOptions,
    slo_ttft_s: float | None,
    slo_tpot_s: float | None,
) -> dict[str, Any]:
    """The whole configuration of a run as JSON values, under the simulator's names."""
    from gllm.policy import format_policy, parse_policy, policy_options  # noqa: PLC0415

    policy, ready = parse_policy(config.policy), client.ready
    found = {"format": trace.format, "num_requests": len(trace.requests), "notes": list(trace.notes)}
    return {
        "model": config.model_name,
        "gpu": ready.device,
        "gpus": f"{config.num_workers} x {ready.device}",
        "policy": format_policy(policy),
        "trace": {**asdict(options), "name": trace.name, **found},
        "parallel": asdict(config.parallel),
        "limits": asdict(config.limits(ready.num_blocks)),
        "num_blocks_given": config.num_blocks is not None,
        "slo_ttft_s": slo_ttft_s,
        "slo_tpot_s": slo_tpot_s,
        "policy_options": policy_options(policy),
        "runtime": config.to_json(),
        "model_shape": asdict(client.model.shape),
        "versions": versions(),
    }
