"""From a request's body to `SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gllm.runtime.sampling_params import FROM_MODEL, SamplingParams
from gllm.runtime.server.errors import bad_request

if TYPE_CHECKING:
    from gllm.runtime.server.engine import ServedEngine
    from gllm.runtime.server.protocol import GenerationBody

FROM_BODY = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "prompt_logprobs"),
    *("skip_special_tokens", "include_stop_str_in_output"),
)


def sampling_params(engine: ServedEngine, body: GenerationBody, **decided: Any) -> SamplingParams:  # noqa: ANN401
    """What the body asks for; where it is silent the model's own defaults; `decided` wins over both.

    Raises:
        ApiError: 400, an option is out of its range.
    """
    options = {name: value for name in FROM_MODEL if (value := engine.defaults.get(name)) is not None}
    options |= {name: value for name in FROM_BODY if (value := getattr(body, name)) is not None}
    options |= {"detokenize": engine.tokenizer is not None} | decided
    try:
        return SamplingParams(**options)
    except ValueError as error:
        message = str(error)
        named = message.partition(" ")[0]
        raise bad_request(message, named if named in type(body).model_fields else None) from error


def num_tokens_for(engine: ServedEngine, num_prompt_tokens: int, wanted: int | None, default: int | None = None) -> int:
    """How long an answer may become: what is wanted, else the default, else all that the model has room for.

    Raises:
        ApiError: 400, the prompt alone or with what is wanted is longer than the model.
    """
    longest = engine.max_model_len
    room = longest - num_prompt_tokens
    if room < 1:
        message = f"the prompt has {num_prompt_tokens} tokens; this model takes {longest}, the answer's included"
        raise bad_request(f"{message}, so shorten the prompt", "prompt")
    if wanted is not None and wanted > room:
        message = f"the prompt has {num_prompt_tokens} tokens and max_tokens is {wanted}; this model takes {longest}"
        raise bad_request(f"{message} together, so ask for at most {room}", "max_tokens")
    return min(room, default or room) if wanted is None else wanted
