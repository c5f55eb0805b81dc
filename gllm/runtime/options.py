"""The runtime's own options, and the configuration they make. Importing this imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.console.options import add_engine_options, add_parallel_options, parallel_options, positive, share, whole

if TYPE_CHECKING:
    import argparse

    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.sampling_params import SamplingParams

_SAMPLING = (
    ("--temperature", float, "T", "0 is greedy"),
    ("--top-p", share, "P", "likeliest tokens that make up so much"),
    ("--top-k", whole(0), "K", "so many likeliest tokens; 0: all"),
    ("--min-p", float, "P", "tokens at least P times as likely as the likeliest"),
    ("--repetition-penalty", positive, "F", "above 1: what was said before is less likely"),
)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """MODEL, first on the line or by name."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a Hugging Face folder; default: gLLM's own")
    add_named_model_option(parser)


def add_named_model_option(parser: argparse.ArgumentParser) -> None:
    """--model, where what stands first on the line is something else."""
    parser.add_argument("--model", dest="model_named", metavar="DIR", help="a Hugging Face folder; default: gLLM's own")


def add_runtime_options(parser: argparse.ArgumentParser, *, seed: bool = True) -> None:
    """How a model is served; vLLM's spellings are understood too."""
    parser.add_argument("--policy", default="throttle", metavar="P", help="NAME[:key=value,...]; see `gllm policies`")
    group = parser.add_argument_group("model and hardware")
    add_parallel_options(group, 1)
    group.add_argument(
        "--enable-expert-parallel", action="store_true", help="spread experts over all ranks of a stage (--ep as --tp)"
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    group.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    group.add_argument(
        "--attention-backend",
        choices=("auto", "triton", "flash", "torch"),
        default="auto",
        help="flash (for long prompts) needs the extra `flash`; default: triton on GPUs",
    )
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    group.add_argument("--skip-tokenizer-init", action="store_true", help="no text: prompts and answers are token ids")
    group.add_argument("--kv-cache-memory-bytes", type=whole(1), metavar="N", help="cache of each worker")
    if seed:
        group.add_argument("--seed", type=whole(0), default=0, help="of random weights (default: 0)")
    group.add_argument("--nnodes", type=whole(1), default=1, metavar="N", help="machines (default: 1)")
    group.add_argument("--node-rank", type=whole(0), default=0, metavar="N", help="which one this is; 0 serves")
    group.add_argument("--rdzv-endpoint", default="", metavar="HOST:PORT", help="where machine 0 is found")
    add_engine_options(parser)


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """How tokens are chosen; what is not given is the model's own."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=whole(1), default=max_tokens, metavar="N", help=f"of an answer (default: {max_tokens})"
    )
    for name, kind, metavar, text in _SAMPLING:
        group.add_argument(name, type=kind, metavar=metavar, help=text)
    group.add_argument("--sampling-seed", type=int, metavar="N", help="the same seed gives the same answers")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer there; may be given again")


def runtime_config(args: argparse.Namespace, *, record: str | None = None) -> RuntimeConfig:
    """The engine that a command line asks for.

    Raises:
        ValueError: Options contradict each other.
    """
    from gllm.runtime.config import Nodes, RuntimeConfig  # noqa: PLC0415 - --help must not wait for it
    from gllm.runtime.default_model import PATH  # noqa: PLC0415

    if args.enable_expert_parallel:
        args.ep = args.tp
    return RuntimeConfig(
        model=next((name for name in (args.model_named, getattr(args, "model", None)) if name is not None), str(PATH)),
        parallel=parallel_options(args, 1),
        nodes=Nodes(num_nodes=args.nnodes, rank=args.node_rank, endpoint=args.rdzv_endpoint),
        policy=args.policy,
        max_num_seqs=args.max_num_seqs,
        block_size=args.block_size,
        max_model_len=args.max_model_len,
        num_blocks=args.num_blocks,
        max_in_flight=args.max_in_flight,
        prefix_caching=args.prefix_caching,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_bytes=args.kv_cache_memory_bytes,
        device=args.device,
        dtype=args.dtype,
        load_format=args.load_format,
        attention_backend=args.attention_backend,
        cuda_graphs=not args.enforce_eager,
        skip_tokenizer_init=args.skip_tokenizer_init,
        seed=args.seed,
        record=record,
    )


def sampling_params(args: argparse.Namespace, folder: str) -> SamplingParams:
    """How a command line wants its tokens chosen, over what the model wants."""
    from gllm.runtime.sampling_params import SamplingParams  # noqa: PLC0415
    from gllm.runtime.tokenizer import sampling_defaults  # noqa: PLC0415

    names = [name[2:].replace("-", "_") for name, *_ in _SAMPLING]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return SamplingParams(
        **{**sampling_defaults(folder), **given}, max_tokens=args.max_tokens, seed=args.sampling_seed, stop=args.stop
    )
