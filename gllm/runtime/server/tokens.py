"""Between text and token ids, for prompts, conversations and the log-probabilities of answers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from gllm.runtime.server.errors import bad_request
from gllm.runtime.server.protocol import is_unicode

if TYPE_CHECKING:
    from collections.abc import Callable

    from gllm.runtime.outputs import Logprobs, TokenLogprob
    from gllm.runtime.server.engine import ServedEngine, Tokenizer
    from gllm.runtime.server.protocol import ChatBody

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


def tokenizer_of(engine: ServedEngine) -> Tokenizer:
    """The engine's tokenizer.

    Raises:
        ApiError: 400, it has none.
    """
    if engine.tokenizer is None:
        raise bad_request("this server has no tokenizer; send token ids to /v1/completions", "prompt")
    tokenizer: Tokenizer = engine.tokenizer
    return tokenizer


async def encode(engine: ServedEngine, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a prompt; in a thread, for a long one takes its time.

    Raises:
        ApiError: 400, there is no tokenizer, or the text is none.
    """
    tokenizer = tokenizer_of(engine)
    if not is_unicode(text):
        raise bad_request("the prompt holds half a surrogate pair, which is no character", "prompt")
    token_ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    if not token_ids:
        raise bad_request("the prompt has no tokens", "prompt")
    return token_ids


async def encode_chat(engine: ServedEngine, body: ChatBody) -> list[int]:
    """Token ids of a conversation, written out by the chat template.

    Raises:
        ApiError: 400, there is no template or it refuses this conversation.
    """
    tokenizer = tokenizer_of(engine)
    if not (engine.chat_template or tokenizer.chat_template):
        raise bad_request("the model has no chat template; use /v1/completions, or start with --chat-template FILE")
    options: dict[str, Any] = {
        "chat_template": engine.chat_template,
        "tokenize": False,
        "add_generation_prompt": body.add_generation_prompt is not False,
        "continue_final_message": bool(body.continue_final_message),
    }
    extra = body.chat_template_kwargs or {}
    if reserved := sorted((options.keys() | {"conversation", "tools", "documents", "return_dict"}) & extra.keys()):
        raise bad_request(f"'chat_template_kwargs' must not hold {reserved[0]!r}", "chat_template_kwargs")
    text = await asyncio.to_thread(_render, tokenizer, body, options | extra)
    return await encode(engine, text, add_special_tokens=False)  # the template writes its own


def _render(tokenizer: Tokenizer, body: ChatBody, options: dict[str, Any]) -> str:
    conversation = [message.to_template() for message in body.messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, **options))
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise bad_request(f"the chat template refuses this conversation: {error}", "messages") from error


def decoder(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """What writes a single token as text; without a tokenizer, its number."""
    if tokenizer is None:
        return "token_id:{}".format
    return lambda token_id: tokenizer.decode([token_id])


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _chat_token(decode: Callable[[int], str], token: TokenLogprob) -> dict[str, Any]:
    text = decode(token.token_id)
    return {"token": text, "logprob": _finite(token.logprob), "bytes": list(text.encode())}


def chat_logprobs(decode: Callable[[int], str], entries: list[Logprobs]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a chat answer."""
    return {
        "content": [
            _chat_token(decode, chosen) | {"top_logprobs": [_chat_token(decode, each) for each in likeliest]}
            for chosen, *likeliest in entries
        ],
        "refusal": None,
    }


def completion_logprobs(
    decode: Callable[[int], str], token_ids: list[int], entries: list[Logprobs | None], *, offset: int = 0
) -> dict[str, Any]:
    """OpenAI's `logprobs` of a completion.

    Args:
        decode: writes a token as text.
        token_ids: the tokens, the prompt's among them if it is echoed.
        entries: theirs; None for a prompt's first token, which nothing predicts.
        offset: characters before them.
    """
    tokens, offsets = [decode(each) for each in token_ids], []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else _finite(entry[0].logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _by_text(decode, entry) for entry in entries],
        "text_offset": offsets,
    }


def _by_text(decode: Callable[[int], str], entry: Logprobs) -> dict[str, float]:
    """The likeliest tokens and the one that stands there; of several with one text, the likeliest."""
    texts: dict[str, float] = {}
    for token in sorted(entry, key=lambda token: token.rank):
        texts.setdefault(decode(token.token_id), _finite(token.logprob))
    return texts


def prompt_logprobs(decode: Callable[[int], str], entries: list[Logprobs | None]) -> list[dict[str, Any] | None]:
    """The prompt's `prompt_logprobs` in vLLM's form: by token id."""
    return [
        None
        if entry is None
        else {
            str(each.token_id): {
                "logprob": _finite(each.logprob),
                "rank": each.rank,
                "decoded_token": decode(each.token_id),
            }
            for each in entry
        }
        for entry in entries
    ]
