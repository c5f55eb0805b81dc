"""A model's tokenizer and its own wishes for sampling, from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm.runtime.sampling_params import FROM_MODEL, SamplingParams

if TYPE_CHECKING:
    from gllm.runtime.config import RuntimeConfig

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_ANY_LENGTH = 1 << 62  # how long a prompt may be is our business, and transformers would only warn


def load_tokenizer(config: RuntimeConfig) -> Any:  # noqa: ANN401 - transformers' own
    """The tokenizer; None where the folder has none, or none is wanted: then prompts and answers are token ids.

    Raises:
        ValueError: There is one, and it cannot be read.
    """
    folder = config.model
    if config.skip_tokenizer_init or not any(Path(folder, name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds; the model loads meanwhile

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=_ANY_LENGTH)
    except Exception as error:  # noqa: BLE001 - it raises all kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {reason}); "
            "give the folder a tokenizer.json, or serve token ids alone with --skip-tokenizer-init"
        ) from None


def sampling_defaults(folder: str) -> dict[str, Any]:
    """What generation_config.json says of sampling; without `do_sample`, that is to be greedy."""
    path = Path(folder, "generation_config.json")
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    found = {name: config[name] for name in FROM_MODEL if config.get(name) is not None}
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found
