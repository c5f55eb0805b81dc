"""What stands before and behind the workers: the way of a request to its engine, and the engine's own loop."""

from __future__ import annotations

import random
import time
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple

from gllm.policy import parse_policy
from gllm.runtime.client import EngineClient
from gllm.runtime.config import RuntimeConfig
from gllm.runtime.default_model import PATH
from gllm.runtime.engine.loop import EngineLoop
from gllm.runtime.engine.recording import Recording, unpack
from gllm.runtime.messages import NewRequest, Progress, Submit
from gllm.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from gllm.core import Limits
    from gllm.runtime.engine.loop import Workers as StepWorkers
    from gllm.runtime.messages import Notice

    class Workers(StepWorkers, Protocol):
        """Who computes."""

        def attend(self, loop: EngineLoop) -> None:
            """Wait a moment for something to come, and let a loop take its turns with it."""


_NUM_REQUESTS = 20
_NUM_TOKENS = 20  # of a prompt, and of its answer
_PROMPT, _PAUSE_S = 1000, 0.01  # of requests on their way to an engine, and between them


class HostTimes(NamedTuple):
    """Medians."""

    dispatch_ns: int  # from the engine's decision to the start of a first stage that idles
    return_ns: int  # from the last stage's end until the engine takes the turn with the tokens


def measure_intake() -> int:
    """From a request's arrival at a front end to the turn in which an idle engine takes it, ns.

    The engine is one of its own, with gLLM's small model on the CPU: what the way takes depends on no model.
    """
    with EngineClient(RuntimeConfig(model=str(PATH), device="cpu", record="")) as client:
        client.wait_until_ready()
        length = min(_PROMPT, client.ready.max_model_len - 1)
        for key in range(_NUM_REQUESTS):
            tokens = [(key * length + place) % client.model.shape.vocab_size for place in range(length)]
            params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1, detokenize=False)
            client.submit([NewRequest(key, tokens, params, seed=key, arrival_ns=time.monotonic_ns())])
            while not _is_answered(client.receive(None)):
                pass
            time.sleep(_PAUSE_S)
        columns = client.finish()
    assert columns is not None, "the engine keeps a record"
    requests = unpack(columns, {}).requests
    ways_ns: list[int] = (requests["scheduled_ns"] - requests["arrival_ns"]).tolist()
    return max(0, median_low(ways_ns))


def _is_answered(notice: Notice | None) -> bool:
    return isinstance(notice, Progress) and any(delta.finish_reason is not None for delta in notice.deltas)


def measure_host(workers: Workers, policy: str, limits: Limits, vocab_size: int) -> tuple[HostTimes, int]:
    """Serve some requests; also how many steps that took, numbered from 0."""
    recording = Recording(limits, "")
    loop = EngineLoop(parse_policy(policy), limits, (), workers, lambda _: None, recording)
    generator = random.Random(0)
    for key in range(_NUM_REQUESTS):
        loop.command(Submit([_request(key, generator.choices(range(vocab_size), k=_NUM_TOKENS))]))
        loop.run()
        while not (loop.is_idle and recording.is_whole):
            workers.attend(loop)
    record = unpack(recording.pack(0.0), {})
    times = host_times(
        record.batches["dispatched_ns"].tolist(),
        record.stage_start_ns[:, 0].tolist(),
        record.stage_end_ns[:, -1].tolist(),
        record.done_ns.tolist(),
    )
    return times, len(record.batches)


def _request(key: int, tokens: list[int]) -> NewRequest:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_NUM_TOKENS, detokenize=False)
    return NewRequest(key, tokens, params, seed=key, arrival_ns=0)


def host_times(dispatched: Sequence[int], starts: Sequence[int], ends: Sequence[int], done: Sequence[int]) -> HostTimes:
    """From each step's decision, its first stage's start, its last stage's end and the turn that took its result."""
    was_empty = [True, *(now >= before for now, before in zip(dispatched[1:], done, strict=False))]
    waited = [start - now for now, start, empty in zip(dispatched, starts, was_empty, strict=True) if empty]
    back = [now - end for now, end in zip(done, ends, strict=True)]
    # A GPU's clock and the host's drift apart: by more than little waits, some time after they were compared.
    return HostTimes(max(0, median_low(waited)), max(0, median_low(back)))
