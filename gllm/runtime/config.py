"""What serves: `RuntimeConfig`, plain values that a command line or a script sets; every process gets the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gllm.parallel import Parallel

if TYPE_CHECKING:
    from gllm.core import Limits
    from gllm.runtime.model_config import ModelConfig

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
AttentionBackend = Literal["auto", "triton", "flash", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Several machines, as torchrun counts them; the first (rank 0) holds the front end and the engine."""

    num_nodes: int = 1
    rank: int = 0
    endpoint: str = ""  # HOST:PORT of node 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_nodes:
            last = self.num_nodes - 1
            raise ValueError(f"--node-rank is {self.rank}; with --nnodes {self.num_nodes} it is 0 to {last}")
        if self.num_nodes == 1 and self.endpoint:
            raise ValueError("--rdzv-endpoint is where several nodes meet; say with --nnodes how many there are")
        host, _, port = self.endpoint.rpartition(":")
        if self.num_nodes > 1 and not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise ValueError(f"--rdzv-endpoint is {self.endpoint!r}; several nodes meet at HOST:PORT of node 0")

    @property
    def host(self) -> str:
        """Where node 0 is found."""
        return self.endpoint.rpartition(":")[0]

    def check_endpoint(self) -> None:
        """On node 0 of several: see that the others can meet there.

        Raises:
            ValueError: The address is another machine's, or taken.
        """
        if self.num_nodes == 1 or self.rank > 0:
            return
        import socket  # noqa: PLC0415 - not for --help

        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((self.host, int(self.endpoint.rpartition(":")[2])))
            except OSError as error:
                raise ValueError(
                    f"--rdzv-endpoint {self.endpoint} cannot be had on this machine, node 0 ({error.strerror}); "
                    "name another port, or --node-rank"
                ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """A whole engine. None and "auto" mean: what the model or the machine gives."""

    model: str  # a folder with config.json, safetensors and a tokenizer
    parallel: Parallel = Parallel()
    nodes: Nodes = Nodes()
    policy: str = "throttle"  # NAME[:key=value,...]
    max_num_seqs: int = 1024
    block_size: int = 16
    max_model_len: int | None = None
    num_blocks: int | None = None
    max_in_flight: int = 0  # 0: one for each stage, and one that is planned ahead
    prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None  # on each GPU or process; None: what is left (on a CPU: 1 GiB)
    device: Device = "auto"
    dtype: Dtype = "auto"
    load_format: LoadFormat = "auto"
    attention_backend: AttentionBackend = "auto"
    cuda_graphs: bool = True
    skip_tokenizer_init: bool = False
    seed: int = 0
    record: str | None = None  # keep the run's columns; "" for them alone, else also a decision log at this path

    def __post_init__(self) -> None:
        size = self.parallel.num_gpus
        if size % self.nodes.num_nodes:
            raise ValueError(f"--nnodes {self.nodes.num_nodes} does not divide the {size} workers of --pp times --tp")

    @property
    def model_name(self) -> str:
        """What servers and reports call the model: its folder's name."""
        from gllm.runtime.default_model import NAME, PATH  # noqa: PLC0415 - not for --help

        path = Path(self.model).absolute()
        return NAME if path == PATH else path.name

    @property
    def num_workers(self) -> int:
        """Processes that compute, on all nodes."""
        return self.parallel.num_gpus

    @property
    def num_local_workers(self) -> int:
        """Processes that compute on each node."""
        return self.parallel.num_gpus // self.nodes.num_nodes

    def limits(self, num_blocks: int) -> Limits:
        """What the core is told, once it is known how many cache blocks there are."""
        return self._limits(num_blocks, self.max_model_len or self.check().max_position_embeddings)

    def _limits(self, num_blocks: int, longest: int) -> Limits:
        from gllm.core import Limits  # noqa: PLC0415 - not for --help

        return Limits(
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_model_len=longest,
            max_num_seqs=self.max_num_seqs,
            depth=self.parallel.pp,
            max_in_flight=self.max_in_flight or self.parallel.pp + 1,
            prefix_caching=self.prefix_caching,
        )

    def check(self) -> ModelConfig:
        """Look at the model's folder and see that everything fits together, before anything is loaded.

        Raises:
            ValueError: One line that names the option to change.
        """
        from gllm.policy import parse_policy  # noqa: PLC0415 - not for --help
        from gllm.runtime.model_config import load_model_config  # noqa: PLC0415

        parse_policy(self.policy)
        model = load_model_config(Path(self.model))
        self.parallel.check(model.shape)
        longest = model.max_position_embeddings
        if self.max_model_len is not None and self.max_model_len > longest:
            raise ValueError(
                f"--max-model-len {self.max_model_len} is more than the {longest} positions of {self.model}; lower it"
            )
        self._limits(1 if self.num_blocks is None else self.num_blocks, longest)
        return model

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)
