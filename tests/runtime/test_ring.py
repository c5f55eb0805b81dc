"""The ring between two GPUs, on streams that this file plays: any order that streams allow, and values that arrive."""

import ctypes
import random
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from runtime.ranks import on_processes

from gllm.model_shape import load_shape
from gllm.parallel import Parallel
from gllm.runtime.worker import groups
from gllm.runtime.worker import ring as rings
from gllm.runtime.worker.groups import Edge, connect
from gllm.runtime.worker.ring import COUNTER_BYTES, CudaDriver, Ring, ring_bytes
from gllm.runtime.worker.symmetric import SEVERAL_HOSTS, MappedMemory, NoSharedMemoryError

SENDER, RECEIVER = 1, 2
CPU = torch.device("cpu")


class PlayedStreams:
    """Operations that run in the order of their stream, streams in any; a copy is done byte range by byte range."""

    def __init__(self, seed):
        self.lots = random.Random(seed)
        self.queues = {}

    def call(self, stream, run, is_ready=lambda: True):
        self.queues.setdefault(stream, []).append((run, is_ready))

    def wait(self, stream, address, value):
        def is_ready():
            return ctypes.c_int32(ctypes.c_uint32.from_address(address).value - value).value >= 0

        self.call(stream, lambda: None, is_ready)

    def write(self, stream, address, value):
        assert 0 <= value < 1 << 32

        def run():
            ctypes.c_uint32.from_address(address).value = value

        self.call(stream, run)

    def copy(self, stream, target, source, num_bytes):
        half = num_bytes // 2
        self.call(stream, lambda: ctypes.memmove(target, source, half))
        self.call(stream, lambda: ctypes.memmove(target + half, source + half, num_bytes - half))

    def play(self, steps=None):
        """Until nothing can go on, or for so many operations; whether nothing is left."""
        while steps is None or steps > 0:
            ready = [queue for queue in self.queues.values() if queue and queue[0][1]()]
            if not ready:
                break
            self.lots.choice(ready).pop(0)[0]()
            steps = None if steps is None else steps - 1
        return not any(self.queues.values())


class Ends:
    """A ring in this process' memory."""

    def __init__(self, streams, num_slots, slot_bytes, count=0):
        size = ring_bytes(num_slots, slot_bytes)
        self.buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
        one, other = (buffer.data_ptr() for buffer in self.buffers)
        self.sender = Ring(streams, one, other, num_slots=num_slots, slot_bytes=slot_bytes)
        self.receiver = Ring(streams, other, one, num_slots=num_slots, slot_bytes=slot_bytes)
        self.sender._count = self.receiver._count = count
        for buffer in self.buffers:
            ctypes.c_uint32.from_address(buffer.data_ptr()).value = count & 0xFFFFFFFF


def payload(number, size):
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def _exchange(seed, num_slots, slot_bytes, *, count=0, num_tensors=60):
    """Both hosts launch when they like, streams go on when they like; what came."""
    streams = PlayedStreams(seed)
    ends = Ends(streams, num_slots, slot_bytes, count)
    sizes = [streams.lots.choice([0, 1, slot_bytes, streams.lots.randint(0, slot_bytes)]) for _ in range(num_tensors)]
    sources = [payload(number, size) for number, size in enumerate(sizes)]
    targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    num_put = num_taken = 0
    while num_put < num_tensors or num_taken < num_tensors:
        if num_put < num_tensors and streams.lots.random() < 0.5:
            source = sources[num_put]
            ends.sender.put(SENDER, source.data_ptr(), source.nbytes)
            num_put += 1
        elif num_taken < num_tensors:
            target = targets[num_taken]
            ends.receiver.take(RECEIVER, target.data_ptr(), target.nbytes)
            num_taken += 1
        streams.play(streams.lots.randint(0, 6))
    assert streams.play(), "all came"
    return sources, targets


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_what_is_sent_arrives_in_any_order_of_streams(num_slots):
    for seed in range(20):
        sources, targets = _exchange(seed, num_slots, slot_bytes=300)
        assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_counters_may_overflow():
    for seed in range(10):
        sources, targets = _exchange(seed, 3, 64, count=(1 << 32) - 7)
        assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_a_full_ring_makes_the_stream_wait_and_nobody_else():
    streams = PlayedStreams(0)
    ends = Ends(streams, 2, 16)
    tensors = [payload(number, 16) for number in range(3)]
    for tensor in tensors:
        ends.sender.put(SENDER, tensor.data_ptr(), 16)
    assert not streams.play()
    assert ctypes.c_uint32.from_address(ends.buffers[1].data_ptr()).value == 2
    target = torch.zeros(16, dtype=torch.uint8)
    ends.receiver.take(RECEIVER, target.data_ptr(), 16)
    assert streams.play()
    assert torch.equal(target, tensors[0])
    with pytest.raises(AssertionError, match="slot"):
        ends.sender.put(SENDER, target.data_ptr(), 17)


def test_slots_do_not_overlap_and_fill_the_buffer():
    streams = PlayedStreams(0)
    ring = Ends(streams, 3, 1000).sender
    starts = []
    for _ in range(4):
        starts.append(ring._slot(0))
        ring._count += 1
    assert starts == [COUNTER_BYTES, COUNTER_BYTES + 1024, COUNTER_BYTES + 2048, COUNTER_BYTES]
    assert ring_bytes(3, 1000) == COUNTER_BYTES + 3 * 1024


def _pipeline(max_in_flight, num_slots, *, is_fed, num_stages=3, num_steps=30):
    """A pipeline's edges over one stream a stage, as if hardware put all of a process' streams behind each other.

    Returns whether all steps are computed. `is_fed`: each step needs the tokens of the last but one.
    """
    streams = PlayedStreams(num_slots)
    hidden = [Ends(streams, num_slots, 8) for _ in range(num_stages - 1)]
    tokens = Ends(streams, num_slots, 8)
    memory = torch.zeros(8, dtype=torch.uint8)
    done, awaited = [], []

    def launch(stage, plan):
        if stage == 0:
            newest = max(plan - num_stages if is_fed else -1, plan - max_in_flight)
            while awaited and awaited[0] <= newest:
                awaited.pop(0)
                tokens.receiver.take(stage, memory.data_ptr(), 8)
            awaited.append(plan)
        else:
            hidden[stage - 1].receiver.take(stage, memory.data_ptr(), 8)
        if stage < num_stages - 1:
            hidden[stage].sender.put(stage, memory.data_ptr(), 8)
        else:
            tokens.sender.put(stage, memory.data_ptr(), 8)
            streams.call(stage, lambda: done.append(plan))

    for plan in range(num_steps):
        for stage in range(num_stages):
            launch(stage, plan)
        if plan >= max_in_flight - 1:  # the engine waits for a step before it plans one too many
            streams.play()
            if plan - max_in_flight + 1 not in done:
                return False
    streams.play()
    return len(done) == num_steps


@pytest.mark.parametrize("is_fed", [True, False])
def test_nobody_waits_for_ever_even_for_tokens_that_no_step_feeds_in(is_fed):
    assert _pipeline(4, 5, is_fed=is_fed)
    assert _pipeline(4, 4, is_fed=is_fed)
    assert _pipeline(4, 3, is_fed=False) is False, "fewer slots than steps on the road"


# The driver


class Function:
    """One of the library's, as ctypes has them."""

    def __init__(self, library, name):
        self.library, self.__name__, self.errcheck = library, name, lambda *_: None

    def __call__(self, *arguments):
        self.errcheck(self.library.answer(self.__name__, arguments), self, arguments)


class Library:
    """Stands for libcuda: keeps what it was called with."""

    def __init__(self, can_flush, status=0):
        self.calls = []
        self.can_flush, self.status = can_flush, status

    def __getattr__(self, name):
        return Function(self, name)

    def answer(self, name, arguments):
        if name == "cuDeviceGetAttribute":
            assert arguments[1] == 98
            ctypes.c_int.from_address(arguments[0]).value = self.can_flush
            return 0
        if name == "cuGetErrorName":
            arguments[1]._obj.value = b"CUDA_ERROR_OF_SOME_KIND"
            return 0
        self.calls.append((name, *arguments))
        return 0 if name == "cuCtxGetDevice" else self.status


@pytest.mark.parametrize(("can_flush", "flags"), [(0, 0), (1, 1 << 30)])
def test_calls_of_the_driver(monkeypatch, can_flush, flags):
    library = Library(can_flush)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library if name == "libcuda.so.1" else None)
    driver = CudaDriver()
    driver.wait(7, 4096, 3)
    driver.write(7, 8192, 4)
    driver.copy(7, 512, 256, 100)
    assert library.calls[1:] == [
        ("cuStreamWaitValue32_v2", 7, 4096, 3, flags),
        ("cuStreamWriteValue32_v2", 7, 8192, 4, 0),
        ("cuMemcpyAsync", 512, 256, 100, 7),
    ]


def test_the_driver_refuses(monkeypatch):
    library = Library(0, status=801)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    with pytest.raises(RuntimeError, match="cuStreamWaitValue32_v2: CUDA_ERROR_OF_SOME_KIND"):
        CudaDriver().wait(0, 4096, 1)


# Edges


def _without_a_gpu(rank):
    _, neighbours = connect(Parallel(pp=2), load_shape("qwen3-0.6b"), rank, CPU, 3)
    edge = neighbours.after if rank == 0 else neighbours.before
    came = []
    for number in range(10):
        if rank == 0:
            edge.send(torch.full((4,), float(number)))
        else:
            came.append(edge.receive(torch.zeros(4))[0].item())
    dist.barrier()  # what nobody has taken yet is lost with the sender's edge
    return edge.method, neighbours.tokens.method, came, edge._slot_bytes, neighbours.tokens._slot_bytes


def test_without_a_gpu_tensors_go_through_the_process_group(capfd):
    sender, receiver = on_processes(_without_a_gpu, 2)
    assert sender[:2] == receiver[:2] == ("process group (no GPU)", "process group (no GPU)")
    assert receiver[2] == list(range(10))
    assert sender[3:] == receiver[3:] == (32 << 20, 64 << 10), "tokens take no more than they need"
    assert "gllm:" not in capfd.readouterr().err


def _trial(rank, failing):
    """Memory and driver are there, played; the second end's trial fails at a turn, or at none: both hear why."""
    group, turns = dist.new_group([0, 1]), []

    def turn(_ring, _mine, number):
        turns.append(number)
        if rank == 1 and number == failing:
            raise NoSharedMemoryError("it came otherwise")

    rings.CudaDriver = lambda: PlayedStreams(0)
    rings.map_memory = lambda *_: _memory()
    rings._try_put = rings._try_take = turn
    try:
        rings.share_ring(group, CPU, is_sender=rank == 0, num_slots=3, slot_bytes=64)
    except NoSharedMemoryError as error:
        return str(error), turns
    return "", turns


def _memory():
    buffers = [torch.zeros(ring_bytes(3, 64), dtype=torch.uint8) for _ in range(2)]
    return MappedMemory([buffer.data_ptr() for buffer in buffers], buffers[0], buffers)


@pytest.mark.parametrize(
    ("failing", "why", "turns"), [(1, "it came otherwise", [0, 1]), (None, "", [0, 1, 2, 3])], ids=["fails", "works"]
)
def test_every_slot_is_tried_and_if_one_end_cannot_neither_does(failing, why, turns):
    assert on_processes(partial(_trial, failing=failing), 2) == [(why, turns)] * 2


def test_only_what_fits_a_slot_goes_through_the_ring(monkeypatch):
    monkeypatch.setattr("torch.distributed.new_group", lambda _: None)
    edge = Edge(0, 1, 3, 1000)
    assert edge._ring_for(1000) is None
    edge._ring = Ends(PlayedStreams(0), 4, 1000).sender
    assert edge._ring_for(1000) is edge._ring
    assert edge._ring_for(1001) is None
    assert edge.method == "copy"


class Stream:
    """Keeps what an edge had it do; stands for a stream of torch's."""

    def __init__(self, name, log):
        self.cuda_stream, self.log = name, log

    def wait_stream(self, other):
        self.log.append(("wait for stream", self.cuda_stream, other.cuda_stream))


class Event:
    def record(self, stream):
        self.stream = stream

    def query(self):
        return False


class Operations:
    def __init__(self, log):
        self.wait = lambda stream, _address, value: log.append(("wait", stream, value))
        self.write = lambda stream, _address, value: log.append(("write", stream, value))
        self.copy = lambda stream, _target, _source, num_bytes: log.append(("copy", stream, num_bytes))


class Transfer:
    def __init__(self, log):
        self.log = log

    def wait(self):
        self.log.append("wait for the transfer")


@pytest.fixture
def gpu(monkeypatch):
    """An edge as on a GPU, with a ring or without, and what it has streams and NCCL do; 0 computes, 9 is the edge's."""
    log = []

    def irecv(tensor, *_, **__):
        log.append("irecv")
        tensor.fill_(7)
        return Transfer(log)

    monkeypatch.setattr("torch.distributed.new_group", lambda _: None)
    monkeypatch.setattr("torch.distributed.irecv", irecv)
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: Stream(0, log))
    monkeypatch.setattr("torch.cuda.stream", lambda stream: log.append(("on", stream.cuda_stream)) or nullcontext())
    monkeypatch.setattr("torch.cuda.Event", Event)

    def make(*, has_ring):
        edge = Edge(0, 1, 3, 1000)
        edge._stream = Stream(9, log)
        if has_ring:
            edge._ring = Ring(Operations(log), 0, 0, num_slots=4, slot_bytes=1000)
        return edge, log

    return make


NCCL_RECEIVES = [("wait for stream", 9, 0), ("on", 9), "irecv", "wait for the transfer"]


def test_a_receive_of_nccl_starts_behind_what_the_stream_computes(gpu):
    edge, log = gpu(has_ring=False)
    target = torch.zeros(10)
    assert edge.receive(target) is target
    assert log == NCCL_RECEIVES
    assert target.tolist() == [7.0] * 10
    assert [event.stream.cuda_stream for event, _ in edge._copied] == [0]


def test_a_ring_waits_on_the_computing_stream_and_copies_on_its_own(gpu):
    edge, log = gpu(has_ring=True)
    edge.receive(torch.empty(10))
    assert log == [("wait", 0, 1), ("copy", 0, 40), ("write", 0, 1)]
    log.clear()
    edge.receive(torch.empty(1000))  # too large for a slot
    assert log == NCCL_RECEIVES

    edge, log = gpu(has_ring=True)
    log.clear()
    for _ in range(5):
        edge.send(torch.zeros(4, 10).t())
    once = ("wait for stream", 9, 0)
    assert log[:3] == [once, ("copy", 9, 160), ("write", 9, 1)]
    assert log[-4:] == [once, ("wait", 9, 1), ("copy", 9, 160), ("write", 9, 5)]
    assert [event.stream.cuda_stream for event, _ in edge._copied] == [9] * 5
    assert all(kept.is_contiguous() for _, kept in edge._copied)


class NoGpu:
    """Stands for a GPU's device where there is none."""

    type = "cuda"


@pytest.fixture
def greet(monkeypatch):
    """Greet along an edge from rank 0 to 1 as on GPUs, whose ring is what `share` makes; the edge at both ends."""
    for name in ("new_group", "send", "recv"):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *_, **__: None)
    monkeypatch.setattr("torch.cuda.Stream", lambda _: Stream(9, []))
    monkeypatch.setattr("torch.zeros", lambda *_, **__: None)

    def make(share, ranks=(0, 1), largest_bytes=1 << 40):
        monkeypatch.setattr(groups, "share_ring", share)
        edges = [Edge(*ranks, 3, largest_bytes) for _ in ranks]
        for rank, edge in zip(ranks, edges, strict=True):
            edge.greet(rank, NoGpu())
        return edges

    return make


def test_gpus_make_a_ring_unless_no_tensor_is_worth_a_slot(greet):
    asked = []

    def share(_group, _device, *, is_sender, num_slots, slot_bytes):
        asked.append((is_sender, num_slots, slot_bytes))
        return Ring(Operations([]), 0, 0, num_slots=num_slots, slot_bytes=slot_bytes)

    assert [edge.method for edge in greet(share)] == ["copy", "copy"]
    assert asked == [(True, 4, 32 << 20), (False, 4, 32 << 20)]
    asked.clear()
    assert [edge.method for edge in greet(share, largest_bytes=0)] == ["process group (no slots)"] * 2
    assert not asked


@pytest.mark.parametrize(
    ("ranks", "why", "num_lines"),
    [
        ((0, 1), "a GPU cannot reach another's memory", 1),
        ((1, 2), "a GPU cannot reach another's memory", 0),  # rank 0 has said it
        ((1, 0), "a GPU cannot reach another's memory", 0),
        ((0, 1), SEVERAL_HOSTS, 0),
    ],
)
def test_gpus_of_one_host_that_share_no_memory_are_told_of_once(greet, capsys, ranks, why, num_lines):
    def share(*_, **__):
        raise NoSharedMemoryError(why)

    for edge in greet(share, ranks):
        assert edge.method == f"process group ({why})"
        assert edge._ring_for(1) is None
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"gllm: stages send through NCCL, as their GPUs share no memory: {why}"] * num_lines
