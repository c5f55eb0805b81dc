"""Random traffic for a `Shell`: arrivals, aborts, failures and results in any interleaving, from one seed."""

from __future__ import annotations

from random import Random

from core.driving import Shell

from gllm.core import Limits, Request


def draw_limits(dice):
    depth = dice.choice([1, 2, 4])
    return Limits(
        num_blocks=dice.choice([4, 10, 40, 200]),
        block_size=dice.choice([1, 2, 4, 16]),
        max_model_len=dice.choice([10, 50, 300]),
        max_num_seqs=dice.choice([1, 3, 8, 32]),
        depth=depth,
        max_in_flight=depth + dice.choice([0, 1, 2]),
        prefix_caching=dice.random() < 0.8,
    )


def conversation_hashes(topic, shared, key, count):
    """Chained hashes of `count` blocks: the first `shared` of a topic that others share, then its own."""
    return tuple((topic if index < shared else 1000 + key) * 10_000 + index for index in range(count))


def draw_request(dice, key, now, limits):
    """A request, its true length, and hashes of all blocks it may ever fill."""
    prompt = dice.randint(1, limits.max_model_len + 3)
    hashes = conversation_hashes(dice.randint(0, 2), dice.choice([0, 1, 3, 100]), key, 1000) * (dice.random() < 0.6)
    asked = Request(
        id=key,
        num_prompt_tokens=prompt,
        arrival_ns=now,
        max_tokens=dice.choice([None, 1, 5, 40]),
        priority=dice.randint(0, 3),
        deadline_ns=dice.choice([None, now + 5]),
        block_hashes=hashes[: prompt // limits.block_size],
    )
    return asked, dice.randint(1, 30), hashes


class Traffic:
    """Draws one turn after another."""

    def __init__(self, dice, shell):
        self.dice = dice
        self.shell = shell
        self.num_requests = 0
        self._hashes = {}

    def turn(self):
        dice, shell = self.dice, self.shell
        live = list(shell.ledger.alive)
        shell.turn(
            *[self._arrival() for _ in range(dice.choice([0, 0, 1, 3]))],
            aborts=[dice.randrange(self.num_requests + 1)] if dice.random() < 0.1 else (),
            num_results=min(len(shell.flight), dice.choice([0, 1, 1, 1, 2])),
            failing=[dice.choice(live)] if live and dice.random() < 0.03 else (),
            hashes=self._stop_hashes(),
        )

    def _arrival(self):
        asked, length, hashes = draw_request(self.dice, self.num_requests, self.shell.now, self.shell.engine.limits)
        self.num_requests += 1
        if hashes:
            self._hashes[asked.id] = hashes
        return asked, length

    def _stop_hashes(self):
        """What a shell that knows the tokens says of the prompt and output of each that may stop now."""
        size = self.shell.engine.limits.block_size
        lives = self.shell.ledger.alive
        return {
            key: hashes[: (lives[key].request.num_prompt_tokens + lives[key].true_length) // size]
            for key, hashes in self._hashes.items()
            if key in lives
        }


def run_traffic(spec, seed, num_turns):
    """Play `num_turns` random turns, then to the end; the shell, for what else there is to ask."""
    dice = Random(seed)
    shell = Shell(spec, draw_limits(dice))
    traffic = Traffic(dice, shell)
    for _ in range(num_turns):
        traffic.turn()
    shell.drain()
    assert len(shell.ledger.ended) == traffic.num_requests, "a request was lost"
    return shell
