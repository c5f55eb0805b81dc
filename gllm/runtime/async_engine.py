"""An engine for a server: requests as asynchronous iterators, all in one event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from gllm.runtime.client import EngineClient
from gllm.runtime.errors import EngineDeadError
from gllm.runtime.generation import Generations
from gllm.runtime.tokenizer import load_tokenizer, sampling_defaults

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gllm.runtime.config import RuntimeConfig
    from gllm.runtime.messages import EngineStats
    from gllm.runtime.outputs import Delta
    from gllm.runtime.sampling_params import SamplingParams

_LISTEN_S = 0.2


class AsyncEngine:
    """Satisfies `gllm.runtime.server.engine.ServedEngine`.

    Made outside the event loop (it waits for the model); `lifespan` ties it to one.

    Raises:
        ValueError: The model cannot be loaded.
        EngineDeadError: A process died while it was.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        *,
        served_names: tuple[str, ...] = (),
        chat_template: str | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model_name = config.model_name
        self.served_names = served_names or (self.model_name,)
        self.chat_template = chat_template
        self.created = int(time.time())
        self.defaults = sampling_defaults(config.model)
        self._client = EngineClient(config)
        try:
            self.tokenizer: Any = load_tokenizer(config)
            self.ready = self._client.wait_until_ready(tell)
        except BaseException:
            self._client.close()
            raise
        self.max_model_len = self.ready.max_model_len
        self._generations = Generations(self._client, self.tokenizer)

    @property
    def failure(self) -> str | None:
        """Why the engine is dead."""
        return self._client.failure

    def stats(self) -> EngineStats:
        """The engine's numbers as of its last news."""
        return self._generations.stats

    @asynccontextmanager
    async def lifespan(self, _: object = None) -> AsyncIterator[None]:
        """Listen to the engine, for as long as the event loop serves."""
        closing = threading.Event()
        loop = asyncio.get_running_loop()
        listener = threading.Thread(target=self._listen, args=(loop, closing), daemon=True, name="listen")
        listener.start()
        try:
            yield
        finally:
            closing.set()
            await asyncio.to_thread(listener.join)

    def close(self) -> None:
        """End the engine and everything it started."""
        self._client.close()

    def _listen(self, loop: asyncio.AbstractEventLoop, closing: threading.Event) -> None:
        while not closing.is_set():
            try:
                notice = self._client.receive(_LISTEN_S)
            except EngineDeadError as error:
                loop.call_soon_threadsafe(self._generations.fail, error)
                return
            if notice is not None:
                loop.call_soon_threadsafe(self._generations.deliver, notice)

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, *, priority: int = 0
    ) -> AsyncIterator[Delta]:
        """Answer a prompt `params.n` times; closing the iterator aborts what is left."""
        news: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        requests = self._generations.prepare(prompt_token_ids, params, news.put_nowait, priority=priority)
        try:
            self._generations.submit(requests)
            left = len(requests)
            while left:
                delta = await news.get()
                if isinstance(delta, Exception):
                    raise delta
                left -= delta.finish_reason is not None
                yield delta
        finally:
            self._generations.abort(requests)
