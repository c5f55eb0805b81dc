"""`chat`: a conversation on the terminal; answers appear as they grow."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from gllm.console.terminal import say, warn
from gllm.runtime.options import runtime_config, sampling_params

if TYPE_CHECKING:
    from argparse import Namespace

    from gllm.runtime.llm import LLM, Message
    from gllm.runtime.sampling_params import SamplingParams

_HELP = "/clear forgets the conversation, /exit or end of input leaves; Ctrl-C cuts an answer short"


def chat(args: Namespace) -> int:
    """Talk until the end of input; return the exit status."""
    config = runtime_config(args)
    config.check()
    params = sampling_params(args, config.model)
    from gllm.runtime.llm import LLM  # noqa: PLC0415 - after the mistakes that need no engine

    with LLM(config) as llm:
        llm.check_chat()
        if sys.stdin.isatty():
            say(_HELP)
        _converse(llm, params, [{"role": "system", "content": args.system}] if args.system else [])
    return 0


def _converse(llm: LLM, params: SamplingParams, beginning: list[Message]) -> None:
    history = list(beginning)
    while (line := _ask()) is not None and line != "/exit":
        if line == "/clear":
            history = list(beginning)
        elif line:
            asked = [*history, {"role": "user", "content": line}]
            try:
                answer = _answer(llm, params, asked)
            except ValueError as error:  # most likely the conversation has become too long
                warn(f"{error}; /clear begins anew")
                continue
            history = [*asked, {"role": "assistant", "content": answer}]


def _ask() -> str | None:
    """The next line; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(llm: LLM, params: SamplingParams, history: list[Message]) -> str:
    text = ""
    with suppress(KeyboardInterrupt):
        for delta in llm.stream_chat(history, params):
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            text += delta.text
    say("")
    return text
