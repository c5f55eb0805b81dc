"""`serve`: an OpenAI endpoint in front of an engine. On every node but the first: that node's workers alone."""

from __future__ import annotations

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

_LINGER_S = 1.5  # /health says why the engine died, before the process does


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
    return file.read_text(encoding="utf-8")


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
    if status:
        warn("error: a worker of this node died; node 0 says why")
    return status
