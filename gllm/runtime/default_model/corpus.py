"""What training reads: endless documents of the tasks, packed into rows of one width. No torch here; numpy arrays."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import numpy as np

from gllm.runtime.default_model.tasks import SCORED, draw_case, draw_problem
from gllm.runtime.default_model.tokenizer import END_OF_TEXT, PAD, chat_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gllm.runtime.default_model.tokenizer import Piece

    Rows = tuple[np.ndarray, np.ndarray, np.ndarray]

IGNORED = -100
"""The target where nothing is to be learned; what torch's cross_entropy leaves out."""
LINE_SHARE = 0.2
"""Of the documents: lines to complete, instead of chats."""
QUESTION_SHARE = 0.3
"""Of the lines: a chat's question without the marks of a chat, its answer on the next line."""
WEIGHTS = {"copy": 3, "sort": 6, "arithmetic": 9, "json": 4, "talk": 1.5}
"""How often each task is drawn: the hard ones and those with short answers more."""


def packed_rows(num_rows: int, width: int, seed: str) -> Iterator[Rows]:
    """Batches for ever: tokens, the number of each token's document in its row, and the token that is to follow.

    All three are int16 arrays of (num_rows, width). A document is never cut; rows are filled up with padding.
    """
    documents = _documents(Random(seed), width)
    document = next(documents)
    while True:
        batch = np.empty((3, num_rows, width), dtype=np.int16)
        for row in range(num_rows):
            batch[0, row], batch[1, row], batch[2, row] = PAD, -1, IGNORED
            start = number = 0
            while start + len(document[0]) <= width:
                place = slice(start, start + len(document[0]))
                batch[0, row, place], batch[1, row, place], batch[2, row, place] = document[0], number, document[1]
                start, number, document = place.stop, number + 1, next(documents)
        yield batch[0], batch[1], batch[2]


def document_arrays(pieces: Iterator[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and for each the token that is to follow if that is to be learned."""
    tokens: list[int] = []
    targets: list[int] = []
    for ids, learned in pieces:
        tokens += ids
        targets += ids if learned else [IGNORED] * len(ids)
    return np.array(tokens, dtype=np.int16), np.array([*targets[1:], IGNORED], dtype=np.int16)


def _documents(rng: Random, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    tasks, weights = list(WEIGHTS), list(WEIGHTS.values())
    while True:
        (task,) = rng.choices(tasks, weights)
        if rng.random() < LINE_SHARE:
            pieces = _lines(rng, task)
        else:
            case = draw_case(rng, task, held_out=False)
            pieces = chat_pieces(case.messages, case.answer)
        document = document_arrays(pieces)
        if len(document[0]) <= width:
            yield document


def _lines(rng: Random, task: str) -> Iterator[Piece]:
    """A line to complete, now and then after some complete ones; the end follows the last."""
    num_earlier = rng.randint(1, 4) if rng.random() < 0.2 else 0
    for index in range(num_earlier + 1):
        is_last = index == num_earlier
        problem = draw_problem(rng, task if is_last else rng.choice(SCORED), held_out=False)
        is_question = problem.task == "talk" or rng.random() < QUESTION_SHARE
        text, space = (problem.question.rstrip(), "\n") if is_question else (problem.line, " ")
        before, after = (space, "") if rng.random() < 0.2 else ("", space)  # the prompt may end in the space
        yield [*(text + before).encode()], False
        yield [*(after + problem.answer).encode()], True
        yield [END_OF_TEXT if is_last else ord("\n")], is_last
