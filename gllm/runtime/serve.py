"""`serve`: an OpenAI endpoint in front of an engine. On every node but the first: that node's workers alone."""

from __future__ import annotations

import gc
import tempfile
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from gllm.console.progress import tell_seldom
from gllm.console.terminal import warn
from gllm.runtime.options import runtime_config

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from gllm.runtime.async_engine import AsyncEngine
    from gllm.runtime.config import RuntimeConfig

_LINGER_S = 0.8  # /health says why the engine died, before the process does


def serve(args: Namespace) -> int:
    """Serve until a signal; return the exit status."""
    config = runtime_config(args)
    config.check()
    if config.nodes.rank > 0:
        return _work(config)
    template = _read_template(args.chat_template)
    from gllm.runtime.server.serve import bind, serve_app  # noqa: PLC0415 - most mistakes show before it is needed

    with bind(args.host, args.port) as sock, _engine(args, config, template) as engine:
        from gllm.runtime.server.app import create_app  # noqa: PLC0415

        app = create_app(engine, api_key=args.api_key, lifespan=engine.lifespan)
        if not args.quiet:
            warn(f"{engine.served_names[0]} on {engine.ready.device}, {engine.ready.num_blocks:,} cache blocks")
            warn("serving on http://{}:{}/v1".format(*sock.getsockname()[:2]))
        gc.collect()
        gc.freeze()  # what was imported stays: neither serving nor the end need walk through it
        status = serve_app(app, sock=sock, linger_s=_LINGER_S)
        if engine.failure is not None:
            warn(f"error: {engine.failure}")
    return status


@contextmanager
def running(args: Namespace) -> Iterator[str]:
    """Serve on a free port in a thread, for a command that talks to itself; gives the base URL."""
    from gllm.runtime.server.app import create_app  # noqa: PLC0415
    from gllm.runtime.server.serve import Server, bind  # noqa: PLC0415

    config = runtime_config(args)
    config.check()
    with bind("127.0.0.1", 0) as sock, _engine(args, config, None) as engine:
        sock.listen()
        server = Server(create_app(engine, lifespan=engine.lifespan))
        thread = Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True, name="serve")
        thread.start()
        try:
            yield "http://{}:{}".format(*sock.getsockname()[:2])
        finally:
            server.drain()
            thread.join()


@contextmanager
def _engine(args: Namespace, config: RuntimeConfig, template: str | None) -> Iterator[AsyncEngine]:
    from gllm.runtime.async_engine import AsyncEngine  # noqa: PLC0415

    names = tuple(getattr(args, "served_model_name", ()))
    tell = tell_seldom(quiet=args.quiet)
    engine = AsyncEngine(config, served_names=names, chat_template=template, tell=tell)
    try:
        yield engine
    finally:
        engine.close()


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--chat-template {path}: no such file")
    try:
        text = file.read_text(encoding="utf-8")
        _parse_template(text)
    except ValueError as error:
        raise ValueError(f"--chat-template {path}: {error}") from None
    return text


def _parse_template(text: str) -> None:
    """Raise `ValueError` unless it is Jinja; the tag {% generation %} is transformers' own."""
    from jinja2 import Environment, TemplateSyntaxError  # noqa: PLC0415 - only for this option

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)  # noqa: S701 - parsed, never rendered
    except TemplateSyntaxError as error:
        if "generation" not in str(error.message):
            raise ValueError(f"no Jinja template (line {error.lineno}: {error.message})") from None


def _work(config: RuntimeConfig) -> int:
    """Run this node's workers until node 0 has had enough of them."""
    from gllm.runtime import process  # noqa: PLC0415
    from gllm.runtime.worker.task import WorkerTask  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="gllm-") as folder:
        launcher = process.start("gllm.runtime.worker", WorkerTask(config, "", folder))
        try:
            status = launcher.wait()
        finally:
            process.end(launcher, 1.0)
    if status < 0:  # else it has said why itself
        warn(f"error: the workers' launcher {process.how(status)}")
    return abs(status)
