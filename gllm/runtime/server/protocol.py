"""What a request's body may hold. Unknown fields, wrong types and options that are not honoured are refused.

The names are OpenAI's, then vLLM's. A null stands for a field that is left out.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

NOTHING: tuple[Any, ...] = (None, [], {}, "", False)
TEXT_ONLY = (None, {"type": "text"})
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
TOKEN_ID_LIMIT = 2**31
MOST_ANSWERS = 128


def _refusal(message: str, param: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class Body(BaseModel):
    """Strict JSON objects.

    `NEUTRAL` names options that clients know and this server does not honour yet, each with the values that ask for
    nothing; these are dropped, any other value is refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
        if not isinstance(fields, dict):
            return fields
        for name, neutral in cls.NEUTRAL.items():
            if fields.get(name) not in neutral:
                raise _refusal(f"{name!r} is not supported; leave it out", name)
        return {name: value for name, value in fields.items() if name not in cls.NEUTRAL}


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (None, False)}


def is_unicode(text: str) -> bool:
    """Whether all of it are characters: JSON can write half a surrogate pair, which is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stops(stop: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    stops = [stop] if isinstance(stop, str) else stop
    if stop is None or (isinstance(stops, list) and all(isinstance(each, str) and is_unicode(each) for each in stops)):
        return stops
    raise ValueError("must be a string or a list of strings")


class GenerationBody(Body):
    """What both ways to generate share. None: the model's default, then OpenAI's."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stops)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Priority | None = None
    user: str | None = None  # names the client's user; changes nothing here
    metadata: dict[str, str] | None = None  # the client's own notes
    safety_identifier: str | None = None  # like `user`
    prompt_cache_key: str | None = None  # a hint where to route; the prefix cache needs none

    SHARED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "response_format": TEXT_ONLY,
        "structured_outputs": NOTHING,
        "bad_words": NOTHING,
        "allowed_token_ids": (None,),
        "cache_salt": (None,),
        "truncate_prompt_tokens": (None,),
        "spaces_between_special_tokens": (None, True),
        "use_beam_search": (None, False),
        "return_token_ids": (None, False),
        "return_tokens_as_token_ids": (None, False),
    }

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise _refusal("'stream_options' needs 'stream' to be true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise _refusal("'prompt_logprobs' cannot be streamed; leave out 'stream'", "prompt_logprobs")
        return self

    @property
    def num_answers(self) -> int:
        """Answers to each prompt."""
        return self.n or 1


def _is_ids(prompt: Any) -> bool:  # noqa: ANN401 - whatever JSON holds
    return isinstance(prompt, list) and all(type(each) is int and 0 <= each < TOKEN_ID_LIMIT for each in prompt)


def _prompts(prompt: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Any of the four forms as a list of texts and lists of token ids."""
    if isinstance(prompt, str) or (prompt and _is_ids(prompt)):
        return [prompt]
    if isinstance(prompt, list) and (all(isinstance(each, str) for each in prompt) or all(map(_is_ids, prompt))):
        return prompt
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.SHARED,
        "suffix": (None, ""),
        "best_of": (None, 1),
        "prompt_embeds": (None,),
    }

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if not self.prompt or not all(self.prompt):
            raise _refusal("'prompt' is empty; give at least one character or token", "prompt")
        if self.echo and self.stream and self.logprobs is not None and self.num_answers > 1:
            raise _refusal("'echo' with 'logprobs' cannot be streamed for several answers; leave one out", "echo")
        if self.max_tokens == 0 and not self.echo:
            raise _refusal("'max_tokens' must be at least 1; 0 is for 'echo' alone", "max_tokens")
        return self


def _text_of(content: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """A message's text, its parts joined by line breaks."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError("must be a string or a list of text parts")
    for part in content:
        if part.get("type") != "text":
            raise ValueError(f"a part of type {part.get('type')!r} is not supported; this server takes text")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part holds 'type' and a string 'text', and nothing else")
    return "\n".join(part["text"] for part in content)


class Message(Body):
    """One turn of a conversation; an answer's message may be handed back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, BeforeValidator(_text_of)] = None
    name: str | None = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = dict.fromkeys(
        ("tool_calls", "function_call", "refusal", "annotations", "audio", "reasoning", "reasoning_content"), NOTHING
    )

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise _refusal(f"a message of role {self.role!r} needs 'content'", "messages")
        return self

    def to_template(self) -> dict[str, str]:
        """As chat templates read it."""
        given = {"role": self.role, "content": self.content or ""}
        return given if self.name is None else given | {"name": self.name}


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.SHARED,
        **dict.fromkeys(("tools", "functions", "audio", "prediction", "web_search_options", "documents"), NOTHING),
        **dict.fromkeys(("store", "reasoning_effort", "verbosity", "chat_template", "echo"), NOTHING),
        "tool_choice": (None, "none", "auto"),  # with no tools, both are the same
        "function_call": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "modalities": (None, ["text"]),
        "service_tier": (None, "auto", "default"),
        "add_special_tokens": (None, False),
    }

    @model_validator(mode="after")
    def _check_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise _refusal("'top_logprobs' needs 'logprobs' to be true", "top_logprobs")
        if self.max_tokens == 0:
            raise _refusal("'max_tokens' must be at least 1", "max_tokens")
        if None not in (both := (self.max_tokens, self.max_completion_tokens)) and both[0] != both[1]:
            raise _refusal("'max_tokens' and 'max_completion_tokens' differ; give one", "max_tokens")
        if self.continue_final_message and self.add_generation_prompt is not False:
            message = "'continue_final_message' needs 'add_generation_prompt' to be false"
            raise _refusal(message, "continue_final_message")
        return self
