"""What to simulate: `SimConfig`, plain values that a command line or a script sets, and what they resolve to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gllm.core import Engine, Limits
from gllm.model_shape import ModelShape, load_shape
from gllm.parallel import Parallel
from gllm.policy import format_policy, parse_policy, policy_options
from gllm.sim.capacity import kv_capacity
from gllm.sim.constants import RooflineConstants
from gllm.sim.gpus import get_gpu
from gllm.sim.profile import find_profile
from gllm.sim.profiled import Profiled, residuals
from gllm.sim.roofline import Roofline

if TYPE_CHECKING:
    from gllm.core import Policy
    from gllm.sim.cost import CostModel
    from gllm.sim.gpus import Gpu
    from gllm.sim.profile import Profile
    from gllm.trace import TraceOptions

MAX_SIZED_TOKENS = 16_384
"""Buffers are sized for micro-batches of at most so many tokens; an engine computes longer ones in slices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """A whole run but for the trace's contents. None means: what the model or the hardware gives."""

    model: str | ModelShape = "qwen3-32b"  # a known name, a folder with a config.json, or such a file
    gpu: str = "h200"
    parallel: Parallel = Parallel()
    policy: str = "throttle"  # NAME[:key=value,...]
    max_num_seqs: int = 1024
    block_size: int = 16
    max_model_len: int | None = None
    num_blocks: int | None = None
    max_in_flight: int = 0  # 0: one for each stage, and one that is planned ahead
    gpu_memory_utilization: float = 0.9
    prefix_caching: bool = True
    profile: str = "auto"  # whose times: a packaged profile's name, a file, auto or none (see find_profile)
    constants: RooflineConstants = RooflineConstants()  # where they are not the defaults, auto is none
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    trace: TraceOptions | None = None

    def resolve(self) -> Setup:
        """Look everything up and see that it fits together.

        Raises:
            ValueError: One line that names the option to change.
        """
        shape = self.model if isinstance(self.model, ModelShape) else load_shape(self.model)
        gpu, policy = get_gpu(self.gpu), parse_policy(self.policy)
        profile = self._profile(shape, gpu)
        cost: CostModel
        if profile is None:
            cost = Roofline(shape=shape, gpu=gpu, parallel=self.parallel, constants=self.constants)
        else:
            cost = Profiled(profile=profile, shape=shape, gpu=gpu, parallel=self.parallel)
        max_model_len = shape.max_position_embeddings if self.max_model_len is None else self.max_model_len
        num_blocks = self.num_blocks
        if num_blocks is None:
            longest = self._limits(max_model_len, -(-max_model_len // max(self.block_size, 1)))
            num_blocks = kv_capacity(
                shape,
                gpu,
                self.parallel,
                memory_utilization=self.gpu_memory_utilization,
                block_size=self.block_size,
                max_batch_tokens=min(policy.max_batch_tokens(longest), MAX_SIZED_TOKENS),
                kv_dtype_bytes=shape.dtype_bytes,
            )
        limits = self._limits(max_model_len, num_blocks)
        return Setup(config=self, shape=shape, gpu=gpu, policy=policy, limits=limits, cost=cost, profile=profile)

    def _profile(self, shape: ModelShape, gpu: Gpu) -> Profile | None:
        """The profile to use; None: the roofline, which alone heeds constants."""
        has_constants = self.constants != RooflineConstants()
        if has_constants and self.profile not in {"auto", "none"}:
            raise ValueError(f"--cost sets the roofline's constants, which --profile {self.profile} does without")
        return find_profile("none" if has_constants else self.profile, shape, gpu.name, self.parallel)

    def _limits(self, max_model_len: int, num_blocks: int) -> Limits:
        return Limits(
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_model_len=max_model_len,
            max_num_seqs=self.max_num_seqs,
            depth=self.parallel.pp,
            max_in_flight=self.max_in_flight or self.parallel.pp + 1,
            prefix_caching=self.prefix_caching,
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, with what the defaults came to."""
        return self.resolve().to_json()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a `SimConfig` resolves to."""

    config: SimConfig
    shape: ModelShape
    gpu: Gpu
    policy: Policy
    limits: Limits
    cost: CostModel
    profile: Profile | None = None  # what `cost` is made from; None: the roofline

    def engine(self, *, keep_snapshots: bool = False) -> Engine:
        """A fresh engine."""
        return Engine(self.policy, self.limits, keep_snapshots=keep_snapshots)

    def to_json(self) -> dict[str, Any]:
        """The whole configuration as JSON values; `trace` holds the options, without the contents."""
        config = self.config
        return {
            "model": self.shape.name,
            "gpu": self.gpu.name,
            "gpus": f"{config.parallel.num_gpus} x {self.gpu.name}",
            "policy": format_policy(self.policy),
            "trace": None if config.trace is None else {"name": config.trace.source, **asdict(config.trace)},
            "parallel": asdict(config.parallel),
            "limits": asdict(self.limits),
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "num_blocks_given": config.num_blocks is not None,
            "slo_ttft_s": config.slo_ttft_s,
            "slo_tpot_s": config.slo_tpot_s,
            "policy_options": policy_options(self.policy),
            **self._cost_to_json(),
            "cost_constants": asdict(config.constants),
            "model_source": config.model if isinstance(config.model, str) else self.shape.name,
            "model_shape": asdict(self.shape),
            "gpu_sheet": asdict(self.gpu),
        }

    def _cost_to_json(self) -> dict[str, Any]:
        """Where times come from; of a profile also how exact it is, and which times so far were not its own."""
        profile = self.profile
        if profile is None:
            return {"cost_model": "roofline"}
        assert isinstance(self.cost, Profiled)
        found = residuals(profile)
        return {
            "cost_model": f"profile {profile.name}, {profile.date}, {profile.device}",
            "profile_residuals": None if found is None else found._asdict(),
            "profile_notes": list(self.cost.notes),
        }
