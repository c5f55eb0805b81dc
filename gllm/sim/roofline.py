"""How long a micro-batch takes, from a model's shape and a GPU's data sheet: nothing measured, any model, any GPU.

Every operation takes the longer of its arithmetic and its memory traffic (Williams, Waterman and Patterson,
"Roofline", CACM 2009), at the share of the data sheet that good kernels reach, plus a fixed gap per kernel.
With T tokens in the batch, of one layer on one GPU and in bytes and operations:

    projection of p weights      max(2*p*T / FLOP/s, (weights + activations*T) / bytes/s)
    experts, E of them, k each   as above; expected number of experts read E*(1 - (1 - k/E)^T)
    prefill attention            max(4*heads*head_dim*pairs / FLOP/s, KV read once for each chunk / bytes/s)
    decode attention             KV of all contexts, of blocks in common once / bytes/s
    all-reduce, two per layer    latency + 2*(tp - 1)/tp * activations / link bytes/s

Short steps run as CUDA graphs (`gllm.graph_sizes`, as the runtime captures them): T is then the next captured size,
while attention and experts are of the real tokens. Longer ones are launched kernel by kernel, and a stage cannot outrun
its host. Two bounds are not known here and left out: a policy's longest step, which is the runtime's largest size where
it is below ours, and the most chunks of a step in a graph. The arithmetic is + - * / and correctly rounded sums and
roots (Python's own sum() of floats changed in 3.12), so results are equal on every machine.
"""

from __future__ import annotations

from functools import cache, partial
from math import fsum, sqrt
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from gllm.graph_sizes import MAX_TOKENS, graph_sizes, padded, token_graph_sizes
from gllm.parallel import Parallel
from gllm.sim.constants import RooflineConstants
from gllm.sim.cost import COMPONENTS, kept_tokens, tokens_from_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.model_shape import ModelShape
    from gllm.parallel import Stage
    from gllm.sim.cost import Work
    from gllm.sim.gpus import Gpu


# Expected maximum of n standard normal deviates, n = 1 ... 16 (Harter, Biometrika 48, 1961, table 1).
_EXPECTED_MAX = (
    *(0.0, 0.5642, 0.8463, 1.0294, 1.1630, 1.2672, 1.3522, 1.4236),
    *(1.4850, 1.5388, 1.5864, 1.6292, 1.6680, 1.7034, 1.7359, 1.7660),
)


def missed_expert_table(num_experts: int, num_experts_per_token: int) -> tuple[float, ...]:
    """Chance that an expert is hit by none of T tokens, for T = 0, 1, ...: (1 - k/E)^T, until it is negligible.

    By repeated multiplication: the last bit of a power differs between machines.
    """
    stay, table = 1.0 - num_experts_per_token / num_experts, [1.0]
    while table[-1] > 1e-12:
        table.append(table[-1] * stay)
    return tuple(table)


class _Matmul(NamedTuple):
    """Nanoseconds of a projection's arithmetic and memory traffic on one GPU."""

    token_compute_ns: float
    token_memory_ns: float
    weights_ns: float

    def ns(self, num_tokens: float, share_read: float = 1.0) -> float:
        """Take the longer of arithmetic and memory; `share_read` of the weights is read."""
        return max(self.token_compute_ns * num_tokens, self.weights_ns * share_read + self.token_memory_ns * num_tokens)


class _Rank:
    """One layer on one of a stage's GPUs: costs that depend on the number of tokens alone."""

    def __init__(self, shape: ModelShape, gpu: Gpu, parallel: Parallel, constants: RooflineConstants) -> None:
        self.shape, self.gpu, self.parallel, self.constants = shape, gpu, parallel, constants
        tp, width, data = parallel.tp, shape.hidden_size, shape.dtype_bytes
        self.byte_ns = 1e9 / (gpu.bandwidth_bytes_per_s * constants.memory_efficiency)
        self.token_bytes = width * data  # of a hidden state
        query = shape.num_heads * shape.head_dim // tp
        key_value = 2 * parallel.kv_heads_per_rank(shape) * shape.head_dim
        self.projections = (self._matmul(width, query + key_value), self._matmul(query, width))
        self.dense = self._mlp(shape.intermediate_size / tp)
        self.shared = self._mlp(shape.shared_expert_intermediate_size / tp)
        # Both norms read and write the hidden state and the residual; rope and the cache pass over q, k and v.
        self.element_ns = (8 * width + 2 * (query + key_value)) * data * self.byte_ns
        if shape.is_moe:
            self._prepare_experts()

    def _matmul(self, inputs: float, outputs: float) -> _Matmul:
        flop_ns = 1e9 / (self.gpu.bf16_flop_per_s * self.constants.gemm_efficiency)
        element_ns = self.shape.dtype_bytes * self.byte_ns
        return _Matmul(2 * inputs * outputs * flop_ns, (inputs + outputs) * element_ns, inputs * outputs * element_ns)

    def _mlp(self, width: float) -> tuple[_Matmul, ...]:
        """Gate and up in one product, then down; the activation between them reads two and writes one."""
        if not width:
            return ()
        hidden = self.shape.hidden_size
        activation = _Matmul(0.0, 3 * width * self.shape.dtype_bytes * self.byte_ns, 0.0)
        return (self._matmul(hidden, 2 * width), activation, self._matmul(width, hidden))

    def _prepare_experts(self) -> None:
        shape, ep = self.shape, self.parallel.ep
        one = self._mlp(shape.moe_intermediate_size / (self.parallel.tp // ep))
        # As one product, with the weights of all experts of the rank.
        compute_ns, memory_ns, weights_ns = (fsum(times) for times in zip(*one, strict=True))
        self.expert = _Matmul(compute_ns, memory_ns, weights_ns * shape.num_experts / ep)
        self.router = self._matmul(shape.hidden_size, shape.num_experts)
        self.missed = missed_expert_table(shape.num_experts, shape.num_experts_per_token)

    def moe_ns(self, num_tokens: int, num_padding: int) -> float:
        """One layer of experts, with uniform routing, on the fullest of the ep groups; padding visits none of them.

        A group's rows are about normal with variance rows*(1 - 1/ep), so the fullest of ep groups has the expected
        maximum of ep normal deviates more than the mean. The number of experts read is taken at its mean.
        """
        ep, k = self.parallel.ep, self.shape.num_experts_per_token
        num_visiting = num_tokens - num_padding
        rows = num_visiting * k / ep
        extra = _EXPECTED_MAX[min(ep, len(_EXPECTED_MAX)) - 1] * sqrt(rows * (1.0 - 1.0 / ep))
        rows = min(rows + extra, num_visiting * min(k, self.shape.num_experts // ep))
        missed = self.missed[num_visiting] if num_visiting < len(self.missed) else 0.0
        shared_ns = fsum(part.ns(num_tokens) for part in self.shared)
        return self.expert.ns(rows, 1.0 - missed) + self.router.ns(num_tokens) + shared_ns

    def gemm_ns(self, num_tokens: int, num_padding: int, stage: Stage) -> float:
        """Every product of a stage's layers, with the activation between two of them; padding visits shared experts."""
        attention = fsum(part.ns(num_tokens) for part in self.projections)
        dense = fsum(part.ns(num_tokens) for part in self.dense) if stage.num_dense else 0.0
        experts = self.moe_ns(num_tokens, num_padding) if stage.num_moe else 0.0
        return attention * stage.num_layers + dense * stage.num_dense + experts * stage.num_moe

    def all_reduce_ns(self, num_tokens: int) -> float:
        """Sum one hidden state per token over the stage's GPUs, in a ring."""
        tp = self.parallel.tp
        return self._link_ns(2.0 * (tp - 1) / tp * num_tokens * self.token_bytes)

    def _link_ns(self, num_bytes: float) -> float:
        """Pass that many bytes to a neighbour in a collective; nothing to pass means a single GPU."""
        bytes_per_s = self.gpu.link_bytes_per_s * self.constants.all_reduce_efficiency
        return self.gpu.all_reduce_latency_ns + num_bytes * 1e9 / bytes_per_s if num_bytes else 0.0

    def num_kernels(self, stage: Stage) -> int:
        """Kernels of a stage's layers, without the all-reduces."""
        return self.constants.kernels_per_layer * stage.num_layers + self.constants.kernels_per_moe * stage.num_moe

    def launch_ns(self, stage: Stage) -> int:
        """The time the host needs to launch a stage's layers one kernel at a time."""
        num_all_reduces = 2 * stage.num_layers if self.parallel.tp > 1 else 0
        return (self.num_kernels(stage) + num_all_reduces) * self.constants.launch_ns

    def head_ns(self, num_rows: int) -> float:
        """Final norm, logits of the rank's slice of the vocabulary, and sampling, which every rank does whole."""
        if not num_rows:
            return 0.0
        constants, tp, vocab = self.constants, self.parallel.tp, self.shape.vocab_size
        logits_bytes = num_rows * vocab * self.shape.dtype_bytes
        draw_ns = logits_bytes * constants.logits_passes * self.byte_ns
        gather_ns = self._link_ns(logits_bytes * (tp - 1) / tp)
        kernels_ns = constants.kernels_per_head * constants.kernel_gap_ns
        return self._matmul(self.shape.hidden_size, vocab / tp).ns(num_rows) + draw_ns + gather_ns + kernels_ns


def _in_graph(num_tokens: int, sizes: Sequence[int]) -> tuple[int, bool]:
    """How many tokens a step computes, padding among them, and whether it is a graph of one of these sizes."""
    in_graph = bool(sizes) and num_tokens <= sizes[-1]
    return padded(num_tokens, sizes) if in_graph else num_tokens, in_graph


class Roofline:
    """The cost model of one model on one kind of GPU; see the module for its formulas.

    Raises:
        ValueError: the model cannot be spread so.
    """

    def __init__(
        self,
        *,
        shape: ModelShape,
        gpu: Gpu,
        parallel: Parallel = Parallel(),
        constants: RooflineConstants = RooflineConstants(),
    ) -> None:
        parallel.check(shape)
        self.num_stages, self.host_ns, self.return_ns = parallel.pp, constants.host_ns, constants.return_ns
        self.clock = None  # a data sheet does not say how it follows what is computed
        self.intake_ns = constants.intake_ns
        self._constants, self._rank = constants, _Rank(shape, gpu, parallel, constants)
        stages = parallel.stages(shape)
        self._kinds = tuple(dict.fromkeys(stages))  # equal stages cost the same; the last stage is the last kind
        self._kind_of_stage = [self._kinds.index(stage) for stage in stages]
        self._spread = itemgetter(*self._kind_of_stage) if len(self._kinds) < len(stages) else None
        has_graphs = constants.max_graph_size > 0
        self._decode_sizes = graph_sizes(constants.max_graph_size) if has_graphs else []
        self._chunked_sizes = token_graph_sizes(MAX_TOKENS, shape, parallel.tp) if has_graphs else []
        # Each count's cost is computed once; counts are bounded by the batch size.
        self._decode_ns = cache(lambda num_tokens: self._step(num_tokens, self._decode_sizes))
        self._chunked_ns = cache(lambda num_tokens: self._step(num_tokens, self._chunked_sizes))
        self._head_ns = cache(lambda num_rows: int(self._rank.head_ns(num_rows)))
        self._prepare_attention(shape, gpu, parallel)
        self._hop_ns = gpu.send_latency_ns
        self._hop_token_ns = self._rank.token_bytes * 1e9 / (gpu.link_bytes_per_s * constants.send_efficiency)

    def __reduce__(self) -> tuple[partial[Roofline], tuple[()]]:
        """Pickle as the configuration, for sweeps over processes."""
        rank, new = self._rank, partial(Roofline, constants=self._constants)
        return partial(new, shape=rank.shape, gpu=rank.gpu, parallel=rank.parallel), ()

    def _prepare_attention(self, shape: ModelShape, gpu: Gpu, parallel: Parallel) -> None:
        """Nanoseconds per query-key pair, cached token and query of one layer."""
        constants, query = self._constants, shape.num_heads * shape.head_dim // parallel.tp
        kv_bytes = parallel.kv_token_bytes(shape)
        self._kept_tokens = kept_tokens(shape, gpu, parallel)
        query_bytes = 2 * query * shape.dtype_bytes  # the query read, the output written
        byte_ns = 1e9 / (gpu.bandwidth_bytes_per_s * constants.decode_attention_efficiency)
        self._decode_key_ns, self._decode_query_ns = kv_bytes * byte_ns, query_bytes * byte_ns
        self._prefill_key_ns, self._prefill_query_ns = kv_bytes * self._rank.byte_ns, query_bytes * self._rank.byte_ns
        self._pair_ns = 4 * query * 1e9 / (gpu.bf16_flop_per_s * constants.prefill_attention_efficiency)

    def _token_parts(self, num_tokens: int, num_padding: int, kind: Stage) -> tuple[float, float, float]:
        """Nanoseconds of `gemm`, `all_reduce` and `other` in a stage of that kind, whatever the contexts."""
        rank = self._rank
        embedding_ns = 2 * rank.token_bytes * num_tokens * rank.byte_ns if kind.is_first else 0.0
        gaps_ns = rank.num_kernels(kind) * self._constants.kernel_gap_ns
        return (
            rank.gemm_ns(num_tokens, num_padding, kind),
            rank.all_reduce_ns(num_tokens) * (2 * kind.num_layers + kind.is_first),  # the embedding is sliced too
            rank.element_ns * num_tokens * kind.num_layers + gaps_ns + embedding_ns,
        )

    def _step(self, num_tokens: int, sizes: Sequence[int]) -> list[tuple[float, int, int]]:
        """For each kind of stage: time beside attention, layers, and the least time of all."""
        num_computed, in_graph = _in_graph(num_tokens, sizes)
        floors_ns = [0 if in_graph else self._rank.launch_ns(kind) for kind in self._kinds]
        return [
            (fsum(self._token_parts(num_computed, num_computed - num_tokens, kind)), kind.num_layers, floor_ns)
            for kind, floor_ns in zip(self._kinds, floors_ns, strict=True)
        ]

    def _decode_attention_ns(self, work: Work) -> float:
        num_keys = tokens_from_memory(work, self._kept_tokens)
        return num_keys * self._decode_key_ns + work.num_decode_tokens * self._decode_query_ns

    def _prefill_attention_ns(self, work: Work) -> float:
        compute_ns = work.prefill_pairs * self._pair_ns
        memory_ns = work.prefill_context * self._prefill_key_ns + work.num_prefill_tokens * self._prefill_query_ns
        return max(compute_ns, memory_ns)

    def stage_ns(self, work: Work) -> Sequence[int]:
        """How long each stage computes."""
        prefill, decode = work.num_prefill_tokens, work.num_decode_tokens
        attention_ns = self._decode_attention_ns(work)
        if prefill:
            attention_ns += self._prefill_attention_ns(work)
            rows = self._chunked_ns(prefill + decode)
        else:
            rows = self._decode_ns(decode)
        times = []
        for fixed_ns, layers, floor_ns in rows:
            time_ns = fixed_ns + attention_ns * layers
            times.append(int(time_ns) if time_ns > floor_ns else floor_ns)
        times[-1] += self._head_ns(work.num_sampled)
        return times if self._spread is None else self._spread(times)

    def load(self, work: Work) -> None:
        """Nothing: there is no clock."""

    def transfer_ns(self, work: Work) -> int:
        """How long hidden states take to the next stage; zero with a single stage."""
        num_tokens = work.num_prefill_tokens + work.num_decode_tokens
        return int(self._hop_ns + num_tokens * self._hop_token_ns) if self.num_stages > 1 else 0

    def gap_ns(self, work: Work) -> int:  # noqa: ARG002 - gaps between kernels are in the stages' times
        """One micro-batch follows on the other."""
        return 0

    def components(self, work: Work) -> dict[str, list[float]]:
        """Split `stage_ns` by component; for each, one value per stage."""
        rows = [self._kind_components(work, kind) for kind in self._kinds]
        return {name: [rows[kind][name] for kind in self._kind_of_stage] for name in COMPONENTS}

    def _kind_components(self, work: Work, kind: Stage) -> dict[str, float]:
        prefill, decode = work.num_prefill_tokens, work.num_decode_tokens
        num_tokens, sizes = prefill + decode, self._chunked_sizes if prefill else self._decode_sizes
        num_computed, in_graph = _in_graph(num_tokens, sizes)
        gemm, all_reduce, other = self._token_parts(num_computed, num_computed - num_tokens, kind)
        parts = {
            "gemm": gemm,
            "prefill_attention": self._prefill_attention_ns(work) * kind.num_layers,
            "decode_attention": self._decode_attention_ns(work) * kind.num_layers,
            "all_reduce": all_reduce,
            "other": other,
        }
        launch = 0.0 if in_graph else max(0.0, self._rank.launch_ns(kind) - fsum(parts.values()))
        return {**parts, "head": float(self._head_ns(work.num_sampled)) if kind.is_last else 0.0, "launch": launch}
