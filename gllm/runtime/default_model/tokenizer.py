"""The tokenizer: a byte is a token, so that any text goes through unchanged; and the form in which chats are written.

Token ids: 0 to 255 the bytes, then the special tokens of `SPECIAL`; 264 in all, a multiple of 8.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", *(f"<|reserved_{index}|>" for index in range(4)))
END_OF_TEXT, IM_START, IM_END, PAD = range(256, 260)
VOCAB_SIZE = 256 + len(SPECIAL)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Piece = tuple[list[int], bool]
"""Token ids, and whether the model is to learn to say them."""


def chat_pieces(messages: Sequence[dict[str, str]], answer: str) -> Iterator[Piece]:
    """A chat with its answer, as `CHAT_TEMPLATE` writes it; what the assistant says is to be learned."""
    for message in (*messages, {"role": "assistant", "content": answer}):
        yield [IM_START, *f"{message['role']}\n".encode()], False
        yield [*message["content"].encode(), IM_END], message["role"] == "assistant"
        yield [*b"\n"], False


def prompt_ids(messages: Sequence[dict[str, str]]) -> list[int]:
    """A chat up to where the assistant begins to speak."""
    pieces = list(chat_pieces(messages, ""))[:-2]
    return [token for tokens, _ in pieces for token in tokens]


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - training alone writes it

    symbols = _byte_symbols()
    tokenizer = Tokenizer(models.BPE(vocab={symbols[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(), indent=2) + "\n", "utf-8")


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it can be seen, else from U+0100.

    Source: the bytes_to_unicode table of GPT-2's encoder, which the tokenizers library's ByteLevel uses.
    """
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + unseen.index(byte)) for byte in range(256)]
