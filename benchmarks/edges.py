"""What a tensor between two stages costs them, for each of two ways; needs two GPUs of one host that share memory.

    python benchmarks/edges.py [--kinds copy nccl] [--out FOLDER]

`copy` is a ring in the receiver's memory, as stages have it on such GPUs; `nccl` is the process group, as elsewhere. A
step is 60 products of hidden states with a matrix, as of Qwen3-32B. For each way, on GPUs of their own processes:

- `alone_us`: the step with nothing on its way.
- `receiver_us`: the step on the receiver while its next tensor has been asked for and not been sent yet. This is what
  a stage lives with that is faster than the one before, or whose host is ahead.
- `sender_us`: the step on the sender while a tensor that it sent has not been asked for yet.
- `ready_us`: from where the receiver's stream needs a tensor, sent long ago, to where it has it.
- `latency_us`: one way, half of a there and back.
- `send_host_us`, `receive_host_us`: of the host, for a call.
- `activities`: what the profiler saw on the sender's GPU for one tensor.

Every tensor is compared with what was sent. The verdict is the least worst case: by how much the slower end of an edge
gets slower, max(receiver_us - alone_us + max(ready_us, latency_us), sender_us - alone_us) / alone_us, averaged over the
sizes of steps. Writes edges_GPU.json.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import OUT, describe_run, show_table, slug, write_json

from gllm.runtime.worker.groups import Edge

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ("copy", "nccl")
HIDDEN, WIDE = 5120, 25600  # of Qwen3-32B; bfloat16
NUM_PRODUCTS, NUM_MATRICES = 60, 3
STEP_ROWS = (104, 2048)
SENT_ROWS = (1, 104, 2048)  # 10 KB, 1 MB, 20 MB
MAX_IN_FLIGHT = 3
REPETITIONS, NUM_WARM_UPS = 15, 3
NUM_ROUNDS = 20
SLEEP_CYCLES = 40_000_000  # about 20 ms, in which the host gets ahead
TIMEOUT_S = 240


class Bench:
    """One rank's part: 0 sends, 1 receives; both call the same methods in the same order."""

    def __init__(self, rank: int, kind: str) -> None:
        self.rank, self.kind, self.device = rank, kind, torch.device("cuda", rank)
        largest_bytes = SENT_ROWS[-1] * HIDDEN * 2 if kind == "copy" else 0
        self.there, self.back = (Edge(*ranks, MAX_IN_FLIGHT, largest_bytes) for ranks in ((0, 1), (1, 0)))
        self.hosts = dist.new_group([0, 1], backend="gloo")
        for edge in (self.there, self.back):
            edge.greet(rank, self.device)
            if (edge.method == "copy") != (kind == "copy"):
                raise SystemExit(f"{kind} is not what would be measured: {edge.method}")
        self.matrices = [self._random(HIDDEN, WIDE) for _ in range(NUM_MATRICES)]

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device).to(torch.bfloat16)

    def _tensor(self, rows: int, value: float) -> torch.Tensor:
        return torch.full((rows, HIDDEN), value, dtype=torch.bfloat16, device=self.device)

    def meet(self) -> None:
        """Hosts do; no GPU takes part."""
        dist.barrier(group=self.hosts)

    def repeat(self, once: Callable[[int], float]) -> float:
        """Median of a time, microseconds; `once` is told a number to send."""
        times = []
        for number in range(NUM_WARM_UPS + REPETITIONS):
            torch.cuda.synchronize()
            self.meet()
            times.append(once(number))
            torch.cuda.synchronize()
        return round(median(times[NUM_WARM_UPS:]) * 1000, 1)

    def receive(self, rows: int) -> torch.Tensor:
        """The next tensor; it is not there yet when this returns."""
        return self.there.receive(self._tensor(rows, -1.0))

    def check(self, tensor: torch.Tensor, number: int) -> None:
        """It is what was sent."""
        if not bool(tensor.eq(number).all()):
            raise SystemExit(f"{self.kind}: a tensor came otherwise than it was sent")

    def step(self, rows: int) -> Callable[[], tuple[torch.cuda.Event, torch.cuda.Event]]:
        """What launches a step and says when it began and ended; before it the GPU sleeps."""
        x, out = self._random(rows, HIDDEN), torch.empty(rows, WIDE, dtype=torch.bfloat16, device=self.device)

        def launch() -> tuple[torch.cuda.Event, torch.cuda.Event]:
            start, end = _events()
            start.record()
            for number in range(NUM_PRODUCTS):
                torch.mm(x, self.matrices[number % NUM_MATRICES], out=out)
            end.record()
            return start, end

        return launch

    def alone(self, rows: int) -> float:
        """A step on each GPU with nothing on its way."""
        launch = self.step(rows)

        def once(_: int) -> float:
            torch.cuda._sleep(SLEEP_CYCLES)  # noqa: SLF001 - torch has no other
            start, end = launch()
            end.synchronize()
            return start.elapsed_time(end)

        return self.repeat(once)

    def beside_a_receive(self, rows: int) -> float:
        """The receiver's step; rank 0 sends when it has ended."""
        launch = self.step(rows)

        def once(number: int) -> float:
            if self.rank == 0:
                self.meet()
                self.there.send(self._tensor(rows, number))
                return 0.0
            torch.cuda._sleep(SLEEP_CYCLES)  # noqa: SLF001
            start, end = launch()
            tensor = self.receive(rows)
            end.synchronize()
            self.meet()
            self.check(tensor, number)
            return start.elapsed_time(end)

        return self.repeat(once)

    def beside_a_send(self, rows: int) -> float:
        """The sender's step; rank 1 asks when it has ended."""
        launch = self.step(rows)

        def once(number: int) -> float:
            if self.rank == 1:
                self.meet()
                self.check(self.receive(rows), number)
                return 0.0
            torch.cuda._sleep(SLEEP_CYCLES)  # noqa: SLF001
            self.there.send(self._tensor(rows, number))
            start, end = launch()
            end.synchronize()
            self.meet()
            return start.elapsed_time(end)

        return self.repeat(once)

    def ready(self, rows: int) -> float:
        """Until the receiver's stream has what was sent long ago."""

        def once(number: int) -> float:
            if self.rank == 0:
                self.there.send(self._tensor(rows, number))
                return 0.0
            torch.cuda._sleep(SLEEP_CYCLES)  # noqa: SLF001
            target, (start, end) = self._tensor(rows, -1.0), _events()
            start.record()
            self.there.receive(target)
            end.record()
            end.synchronize()
            self.check(target, number)
            return start.elapsed_time(end)

        return self.repeat(once)

    def latency(self, rows: int) -> tuple[float, float, float]:
        """One way, on the GPU; then the host's time to send and to receive, both on rank 0."""
        host: list[tuple[float, float]] = []

        def once(number: int) -> float:
            tensor = self._tensor(rows, number)
            if self.rank == 1:
                for _ in range(NUM_ROUNDS):
                    tensor = self.receive(rows)
                    self.back.send(tensor)
                self.check(tensor, number)
                return 0.0
            targets = [self._tensor(rows, -1.0) for _ in range(NUM_ROUNDS)]
            torch.cuda._sleep(SLEEP_CYCLES)  # noqa: SLF001
            start, end = _events()
            start.record()
            for target in targets:
                began = time.perf_counter()
                self.there.send(tensor)
                sent = time.perf_counter()
                self.back.receive(target)
                host.append((sent - began, time.perf_counter() - sent))
            end.record()
            end.synchronize()
            for target in targets:
                self.check(target, number)
            return start.elapsed_time(end) / (2 * NUM_ROUNDS)

        latency_us = self.repeat(once)
        send_us, receive_us = (round(median(times) * 1e6, 1) for times in zip(*host or [(0.0, 0.0)], strict=True))
        return latency_us, send_us, receive_us

    def activities(self) -> list[str]:
        """What runs on the sender's GPU for one large tensor."""
        tensor = self._tensor(SENT_ROWS[-1], 1.0)
        torch.cuda.synchronize()
        self.meet()
        if self.rank == 1:
            self.check(self.receive(SENT_ROWS[-1]), 1)
            return []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            self.there.send(tensor)
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        return sorted({event.name for event in profiled.events() if event.device_type == on_gpu})

    def run(self) -> dict[str, Any]:
        """All of it, of this rank."""
        steps = {
            rows: {
                "alone_us": self.alone(rows),
                "receiver_us": self.beside_a_receive(rows),
                "sender_us": self.beside_a_send(rows),
            }
            for rows in STEP_ROWS
        }
        sent = {}
        for rows in SENT_ROWS:
            latency_us, send_us, receive_us = self.latency(rows)
            sent[rows] = {
                "bytes": rows * HIDDEN * 2,
                "ready_us": self.ready(rows),
                "latency_us": latency_us,
                "send_host_us": send_us,
                "receive_host_us": receive_us,
            }
        return {"steps": steps, "sent": sent, "activities": self.activities()}


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _rank(rank: int, kind: str, port: int, found: Any) -> None:  # noqa: ANN401 - a queue of some context
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=2)
    found.put((rank, Bench(rank, kind).run()))
    dist.barrier()
    dist.destroy_process_group()


def measure(kind: str) -> dict[str, Any]:
    """Both ranks of one way, in processes of their own; ends the script if they fail or hang."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    found = mp.get_context("spawn").SimpleQueue()
    ranks = mp.spawn(_rank, (kind, port, found), nprocs=2, join=False)
    deadline = time.monotonic() + TIMEOUT_S
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            sys.exit(f"{kind}: not done after {TIMEOUT_S} s: somebody waits for ever")
    parts = dict(found.get() for _ in range(2))
    return combine(parts[0], parts[1])


def combine(sender: dict[str, Any], receiver: dict[str, Any]) -> dict[str, Any]:
    """Each number from the end that measured it, and what they come to."""
    steps = {
        rows: {
            "alone_us": receiver["steps"][rows]["alone_us"],
            "receiver_us": receiver["steps"][rows]["receiver_us"],
            "sender_alone_us": sender["steps"][rows]["alone_us"],
            "sender_us": sender["steps"][rows]["sender_us"],
        }
        for rows in STEP_ROWS
    }
    sent = {rows: {**sender["sent"][rows], "ready_us": receiver["sent"][rows]["ready_us"]} for rows in SENT_ROWS}
    worst = mean(slowdown(steps[rows], sent[rows]) for rows in STEP_ROWS)
    return {"steps": steps, "sent": sent, "activities": sender["activities"], "slower_by": round(worst, 4)}


def slowdown(step: dict[str, float], sent: dict[str, float]) -> float:
    """By which share of a step the slower end gets slower at worst."""
    arrival_us = max(sent["ready_us"], sent["latency_us"])
    receiver = (step["receiver_us"] - step["alone_us"] + arrival_us) / step["alone_us"]
    return max(receiver, (step["sender_us"] - step["sender_alone_us"]) / step["sender_alone_us"])


def show(kind: str, result: dict[str, Any]) -> None:
    """A way's numbers."""
    print(f"\n{kind}: the slower end gets slower by {100 * result['slower_by']:.1f} % at worst")
    print(f"  on the sender's GPU: {', '.join(result['activities']) or 'the profiler saw nothing'}")
    header = ("rows of a step", "alone us", "receiver waits us", "%", "sender alone us", "sender unheard us", "%")
    show_table(header, [(rows, *_shares(step)) for rows, step in result["steps"].items()])
    header = ("bytes sent", "ready us", "latency us", "host sends us", "host receives us")
    show_table(header, [tuple(sent.values()) for sent in result["sent"].values()])


def _shares(step: dict[str, float]) -> tuple[float | str, ...]:
    alone, receiver, sender_alone, sender = step.values()
    receiver_share, sender_share = receiver / alone - 1, sender / sender_alone - 1
    return alone, receiver, f"{100 * receiver_share:+.1f}", sender_alone, sender, f"{100 * sender_share:+.1f}"


def main() -> int:
    """Measure each way, say which one to keep, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="ways to measure")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for results")
    arguments = parser.parse_args()
    if torch.cuda.device_count() < 2:
        sys.exit("this measures two GPUs, and torch sees fewer here")
    name = torch.cuda.get_device_name(0)
    results = {}
    for kind in arguments.kinds:
        results[kind] = measure(kind)
        show(kind, results[kind])
    keep = min(results, key=lambda kind: results[kind]["slower_by"])
    print(f"\nkeep: {keep}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {**describe_run(("torch",)), "gpu": name, "keep": keep, "kinds": results}
    write_json(arguments.out / f"{slug('edges', name)}.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
