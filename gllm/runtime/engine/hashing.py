"""Chained hashes of token blocks: equal hashes mean equal tokens up to a block's end."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def extend_hashes(hashes: list[int], token_ids: Sequence[int], block_size: int) -> list[int]:
    """Append to `hashes` (of the leading blocks of `token_ids`) those of the full blocks that follow.

    Each is the first 8 bytes of BLAKE2b over the hash before and the block's ids as 64-bit integers.
    """
    previous = hashes[-1] if hashes else 0
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        block = array("q", token_ids[start : start + block_size])
        digest = blake2b(previous.to_bytes(8, "little"), digest_size=8)
        digest.update(block)
        previous = int.from_bytes(digest.digest(), "little")
        hashes.append(previous)
    return hashes
