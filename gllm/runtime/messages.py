"""What the processes say to each other: msgspec structs over ZeroMQ.

    front end --Command--> engine --Notice--> front end
                 engine --Order--> workers --Report--> engine

Times are `time.monotonic_ns()`. Only the front end knows text.
"""

from __future__ import annotations

import msgspec

from gllm.chunk_schedule import ChunkKernel
from gllm.runtime.outputs import FinishReason, Logprobs
from gllm.runtime.sampling_params import SamplingParams


class Message(msgspec.Struct, tag=True, array_like=True, gc=False):
    """Fields by position, the type's name first."""


# Front end to engine


class NewRequest(msgspec.Struct, array_like=True, gc=False):
    """One answer to generate. `key` is the front end's name for it, never used twice."""

    key: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    arrival_ns: int
    priority: int = 0
    deadline_ns: int | None = None
    block_hashes: list[int] | None = None  # None: from the tokens
    num_output_tokens: int | None = None  # a replay's true length: it stops there, whatever is sampled


class Submit(Message):
    """Requests that arrived together: one turn of the engine sees them all."""

    requests: list[NewRequest]


class Abort(Message):
    """The client went away, or its answer is complete."""

    keys: list[int]


class Finish(Message):
    """Send the record of the run, if one is kept, and end."""


Command = Submit | Abort | Finish


# Engine to front end


class TokenDelta(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """What a step added to one answer."""

    key: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[Logprobs] | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[Logprobs | None] | None = None


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """The engine's numbers now (running, waiting, kv_usage) and since its start (the others)."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # share of the blocks in use
    num_preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # of these, found


class Ready(Message):
    """All workers have loaded; what the engine came to."""

    num_blocks: int
    max_model_len: int  # prompt and output; no more than the whole cache
    device: str


class Loading(Message):
    """How far the start is, for people."""

    text: str


class Progress(Message):
    """One turn's news."""

    deltas: list[TokenDelta]
    stats: EngineStats


class Refused(Message):
    """Can never be served."""

    key: int
    reason: str


class Dead(Message):
    """The engine or a worker failed; nothing more will come. `usage` marks what the user can mend."""

    reason: str
    usage: bool = False


class Record(Message):
    """The run's columns, as `gllm.runtime.engine.recording` packs them; None where none was kept."""

    columns: bytes | None


Notice = Ready | Loading | Progress | Refused | Dead | Record


# Engine to workers


class Admission(msgspec.Struct, array_like=True, gc=False):
    """A sequence takes a slot, or comes back to one after a preemption, with its outputs so far."""

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: list[int]


class ChunkWork(msgspec.Struct, array_like=True, gc=False):
    """Prompt tokens [start, start + num_tokens) of one slot; `blocks` are new in its table."""

    slot: int
    start: int
    num_tokens: int
    final: bool
    blocks: list[int]


class Step(Message):
    """One micro-batch. Rows: the decoding slots, then the chunks. Sampled rows: all decodes, then the final chunks."""

    plan: int
    admissions: list[Admission]
    chunks: list[ChunkWork]
    num_decodes: int
    decode_slots: bytes  # packed 32-bit integers
    grown: list[tuple[int, int]]  # (decoding slot, block new in its table)
    depends_on: int  # the newest step whose sampled tokens this one feeds in; -1: none


class Allocate(Message):
    """Make the KV cache."""

    num_blocks: int


class Ping(Message):
    """Nothing to do; sent to see whether a worker is there."""


class Stop(Message):
    """End the process."""


Order = Step | Allocate | Ping | Stop


# Workers to engine


class WorkerReady(Message):
    """Weights are loaded; so many blocks would fit."""

    rank: int
    num_blocks: int
    device: str
    chunk_kernel: ChunkKernel | None  # None: others compute the attention of chunks


class WorkerLoading(Message):
    """How far a worker has read its weights."""

    rank: int
    num_read: int
    num_tensors: int


class Allocated(Message):
    """The cache is there."""

    rank: int


class StepDone(Message):
    """A step's tokens, in the order of its sampled rows; from the last stage."""

    plan: int
    token_ids: bytes  # packed 32-bit integers
    logprobs: list[Logprobs | None] | None
    prompt_logprobs: list[tuple[int, list[Logprobs]]] | None  # (chunk's number, an entry for the token after each)


class StageTime(Message):
    """When a stage computed a step: its layers, then on the last one the head and sampling."""

    plan: int
    stage: int
    start_ns: int
    head_ns: int  # when the layers were done; without a head that is the end
    end_ns: int


class WorkerFailed(Message):
    """A worker, or who watches over it, says what went wrong. `usage`: the user can mend it."""

    rank: int
    reason: str
    usage: bool = False


Report = WorkerReady | WorkerLoading | Allocated | StepDone | StageTime | WorkerFailed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_notice = msgspec.msgpack.Decoder(Notice).decode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
