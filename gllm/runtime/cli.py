"""`python -m gllm.runtime`: serve, generate, chat, replay, evaluate, profile.

Only argparse is imported until a command runs, so that --help is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gllm.console.options import add_slo_options, add_trace_options, positive, whole
from gllm.console.parser import Parser, add_command, add_output, run
from gllm.runtime.options import (
    add_model_option,
    add_named_model_option,
    add_runtime_options,
    add_sampling_options,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gllm.console.parser import Commands


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m gllm.runtime`; returns the exit status."""
    parser = Parser(prog="python -m gllm.runtime", description="Serve a language model.", allow_abbrev=False)
    commands: Commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    add_commands(commands)
    _add_replay(commands)
    _add_profile(commands)
    return run(parser, argv)


def add_commands(commands: Commands) -> None:
    """Those that `gllm` has too; its replay is the simulator's."""
    _add_serve(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_evaluate(commands)


def _add_serve(commands: Commands) -> None:
    parser = add_command(commands, "serve", "gllm.runtime.serve", "serve", "serve a model to OpenAI clients")
    add_model_option(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1)")
    group.add_argument("--port", type=whole(0), default=8000, help="default: 8000; 0: any that is free")
    group.add_argument("--served-model-name", nargs="+", default=[], metavar="NAME", help="default: the folder's name")
    group.add_argument("--api-key", metavar="KEY", help="what clients must send; default: nothing")
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja template in place of the tokenizer's own")
    group.add_argument("--quiet", action="store_true", help="say only what goes wrong")
    add_runtime_options(parser)


def _add_generate(commands: Commands) -> None:
    parser = add_command(commands, "generate", "gllm.runtime.generate", "generate", "complete prompts")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: the lines of standard input")
    add_named_model_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_sampling_options(parser, max_tokens=128)
    add_runtime_options(parser)


def _add_chat(commands: Commands) -> None:
    parser = add_command(commands, "chat", "gllm.runtime.chat", "chat", "talk with a model on the terminal")
    add_model_option(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    add_sampling_options(parser, max_tokens=1024)
    add_runtime_options(parser)


def _add_evaluate(commands: Commands) -> None:
    text = "score gLLM's own small model, or another, through a server"
    parser = add_command(commands, "evaluate", "gllm.runtime.evaluate", "evaluate_command", text)
    add_named_model_option(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--base-url", metavar="URL", help="a server that runs; default: one is started for this")
    group.add_argument("--num-cases", type=whole(1), default=200, metavar="N", help="default: 200")
    group.add_argument("--concurrency", type=whole(1), default=32, metavar="N", help="requests at once (default: 32)")
    group.add_argument("--threshold", type=float, default=0.95, help="exit status 1 below it (default: 0.95)")
    group.add_argument("--case-seed", type=whole(0), default=0, metavar="N", help="of the cases (default: 0)")
    group.add_argument("--json", action="store_true", help="print the scores as JSON instead of a table")
    group.add_argument("--quiet", action="store_true", help="no progress")
    add_runtime_options(parser)


def _add_replay(commands: Commands) -> None:
    parser = add_command(commands, "replay", "gllm.runtime.replay", "replay", "play a trace against the real engine")
    add_trace_options(parser)
    add_named_model_option(parser)
    parser.add_argument("--speed", type=positive, default=1.0, metavar="X", help="play X times as fast (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: 0, greedy)")
    add_runtime_options(parser, seed=False)
    add_slo_options(parser)
    add_output(
        parser,
        "report.html, report.json, requests.csv, record.npz, timeline.json, iterations.jsonl.gz and trace.jsonl.gz",
    )


def _add_profile(commands: Commands) -> None:
    text = "time a model's steps on this machine, for the simulator"
    parser = add_command(commands, "profile", "gllm.runtime.profile.command", "profile", text)
    add_named_model_option(parser)
    group = parser.add_argument_group("profile")
    group.add_argument(
        "--max-tokens-per-step", type=whole(1), metavar="N", help="the largest step measured; default: the policy's"
    )
    group.add_argument("--quick", action="store_true", help="few points: seconds, where all of them take minutes")
    group.add_argument("--out", metavar="FILE", help="default: profile_MODEL_DEVICE.json in this folder")
    group.add_argument("--quiet", action="store_true", help="no progress")
    add_runtime_options(parser)
