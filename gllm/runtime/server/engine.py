"""What the server needs of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from gllm.runtime.messages import EngineStats
    from gllm.runtime.outputs import Delta
    from gllm.runtime.sampling_params import SamplingParams


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the server uses."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:  # noqa: ANN401
        """A conversation as the text that the model reads."""
        ...


class ServedEngine(Protocol):
    """One model, ready to generate. Read-only for the server."""

    @property
    def model_name(self) -> str:
        """Where the model came from; also its name if no other was given."""
        ...

    @property
    def served_names(self) -> tuple[str, ...]:
        """Names that a request may use; the first one is what answers carry."""
        ...

    @property
    def created(self) -> int:
        """Seconds since 1970 when it was loaded."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        ...

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 - a `Tokenizer`, or None: prompts are token ids, answers too
        """The model's tokenizer, if it has one."""
        ...

    @property
    def chat_template(self) -> str | None:
        """A template in place of the tokenizer's own."""
        ...

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What the model's generation_config.json says of sampling."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the engine is dead; None while it lives."""
        ...

    def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, *, priority: int = 0
    ) -> AsyncIterator[Delta]:
        """Answer a prompt, `params.n` times; the last delta of each answer has a finish reason.

        Closing the iterator, or cancelling whoever waits for it, aborts the request.

        Raises:
            ValueError: This engine can never serve the request; before the first delta.
            EngineDeadError: The engine died, at any time.
        """
        ...

    def stats(self) -> EngineStats:
        """The engine's numbers, the newest that are known; never fails."""
        ...
