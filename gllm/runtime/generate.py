"""`generate`: complete prompts from the command line or standard input."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from gllm.console.terminal import say
from gllm.runtime.options import runtime_config, sampling_params

if TYPE_CHECKING:
    from argparse import Namespace

    from gllm.runtime.outputs import RequestOutput


def generate(args: Namespace) -> int:
    """Complete all prompts at once, print them in order; return the exit status."""
    config = runtime_config(args)
    config.check()
    params = sampling_params(args, config.model)
    prompts = args.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("no prompt; give some on the command line, or one a line on standard input")
    from gllm.runtime.llm import LLM  # noqa: PLC0415 - after the mistakes that need no engine

    with LLM(config) as llm:
        for output in llm.generate(prompts, params, use_tqdm=not args.quiet):
            say(_json(output) if args.json else f"{output.prompt}{output.outputs[0].text}")
    return 0


def _json(output: RequestOutput) -> str:
    return json.dumps(asdict(output), ensure_ascii=False)
