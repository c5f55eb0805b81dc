"""An independent account of what an engine does: each request's tokens, from its plans and results alone."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field

from gllm.core import NEVER, Finished, FirstToken, Preempted, Rejected, Request, Scheduled


@dataclass
class Life:
    """One request as the ledger knows it."""

    request: Request
    true_length: int
    limit: int  # of prompt and output
    target: int  # tokens to prefill
    computed: int | None = None  # of the target; None while it waits
    planned: int = 0  # output tokens, those on the road included
    known: int = 0  # output tokens that came back
    token_plan: int = NEVER  # the plan of its newest token
    scheduled: bool = False
    announced: int | None = None  # cached tokens, as its admission's event said

    @property
    def num_tokens(self):
        return self.request.num_prompt_tokens + self.planned


@dataclass
class Ledger:
    limits: object
    max_batch_tokens: int
    alive: dict[int, Life] = field(default_factory=dict)
    ended: dict[int, object] = field(default_factory=dict)  # id -> its last event
    expected: list[object] = field(default_factory=list)  # events of the next turn
    returned: list[tuple[object, int]] = field(default_factory=list)  # plans of this turn and what each discarded
    published: set[int] = field(default_factory=set)
    followed: dict[object, set[int]] = field(default_factory=dict)  # group -> members, by what plans say
    num_preempted: int = 0

    def submit(self, request, true_length):
        assert request.id not in self.alive
        longest = min(self.limits.max_model_len, self.limits.num_blocks * self.limits.block_size)
        room = longest - request.num_prompt_tokens
        if room < 1:
            self.expected.append((Rejected, request.id))
            return
        limit = request.num_prompt_tokens + min(room, request.max_tokens or room)
        self.alive[request.id] = Life(request, true_length, limit, request.num_prompt_tokens)

    def abort(self, key):
        self._end(key, "abort")

    def _end(self, key, reason):
        life = self.alive.pop(key, None)
        if life is not None:
            self.expected.append((Finished, key, reason, life.known))

    def complete(self, plan, sampled, failing):
        """Count the tokens of a plan that came back; return (failed, stopped) ids."""
        for key in failing:
            self._end(key, "error")
        survivors = [key for key in sampled if key in self.alive]
        self.returned.append((plan, len(sampled) - len(survivors)))
        stopped = []
        for key in survivors:
            life = self.alive[key]
            life.known += 1
            if life.known == 1:
                self.expected.append((FirstToken, key))
            if life.known == life.true_length:
                stopped.append(key)
                self._end(key, "stop")
            elif life.request.num_prompt_tokens + life.known == life.limit:
                self._end(key, "length")
        return list(failing), stopped

    def check_returned(self):
        for plan, num_discarded in self.returned:
            assert plan.num_discarded == num_discarded
        self.returned = []

    def check_events(self, events):
        said = [astuple(event) for event in events]
        got = []
        for event, values in zip(events, said, strict=True):
            kind = type(event)
            if kind in (Finished, Rejected):
                assert event.id not in self.ended, "a request ended twice"
                self.ended[event.id] = event
            if kind in (Finished, FirstToken):
                got.append((kind, *values))
            elif kind is Rejected:
                got.append((kind, event.id))
            elif kind is Preempted:
                self.num_preempted += 1
            else:
                self._check_scheduled(event)
        assert sorted(got, key=repr) == sorted(self.expected, key=repr)
        self.expected = []

    def _check_scheduled(self, event):
        assert type(event) is Scheduled
        life = self.alive[event.id]
        assert not life.scheduled, "first admitted twice"
        life.scheduled = True
        life.announced = event.num_cached_tokens

    def _cached(self, life, count):
        size = self.limits.block_size
        hits = life.request.block_hashes[: count // size]
        assert count == len(hits) * size < life.target
        assert count == 0 or self.limits.prefix_caching
        assert self.published.issuperset(hits), "a hit on what was never computed"
        return count

    def plan(self, plan, members):
        """Check a plan against all that is known; return the ids it samples a token for."""
        for key in plan.preempted:
            if key in self.alive:
                self._preempt(self.alive[key])
        sampled = self._check_decode(plan, members)
        finished_prompts = self._check_chunks(plan)
        at_limit = [key for key in (*members, *finished_prompts) if self.alive[key].num_tokens == self.alive[key].limit]
        assert sorted(s.id for s in plan.ending) == sorted(at_limit)
        assert [s.id for s in plan.prefilled] == finished_prompts
        assert plan.num_sampled == len(sampled) + len(finished_prompts)
        assert 0 < plan.num_prefill_tokens + plan.num_decode_tokens <= self.max_batch_tokens
        assert sum(life.computed is not None for life in self.alive.values()) <= self.limits.max_num_seqs
        return [*sampled, *finished_prompts]

    def _preempt(self, life):
        assert life.planned == life.known, "preempted on the road"
        life.target = life.num_tokens
        life.computed = None

    def _check_decode(self, plan, members):
        assert plan.num_decode_tokens == len(members) == len(set(members))
        joined = {entry.sequence.id: entry for entry in plan.joined}
        assert joined.keys() <= set(members)
        self._follow(plan, members, joined)
        lives = {key: self.alive[key] for key in members}
        assert plan.decode_context == sum(life.num_tokens for life in lives.values())
        size = self.limits.block_size
        assert sorted(s.id for s, _ in plan.grown) == sorted(
            k for k, x in lives.items() if x.num_tokens % size == 1 % size
        )
        for key, life in lives.items():
            if key in joined:
                assert (joined[key].previous, joined[key].num_output_tokens) == (life.token_plan, life.planned)
            else:
                assert plan.previous == life.token_plan
            self._check_timing(plan, life)
            assert life.computed == life.target, "a step before its prompt"
            self._sample(plan, life)
        return members

    def _follow(self, plan, members, joined):
        """A shell that keeps each group's members by what plans say of them is never wrong."""
        if plan.group is None:
            assert not members
            assert not plan.left
            assert not joined
            return
        before = self.followed.get(plan.group, set())
        assert set(plan.left) <= before
        self.followed[plan.group] = before - set(plan.left) | joined.keys()
        assert self.followed[plan.group] == set(members)

    def _check_timing(self, plan, life):
        """A step follows its token, or a full pipeline if that is not back; two unknown tokens at most."""
        unknown = life.planned - life.known
        assert unknown <= (self.limits.max_in_flight > self.limits.depth)
        assert not unknown or plan.id - life.token_plan >= self.limits.depth

    def _sample(self, plan, life):
        life.planned += 1
        assert life.num_tokens <= life.limit, "planned beyond the limit"
        life.token_plan = plan.id

    def _check_chunks(self, plan):
        pairs = context = tokens = 0
        finished = []
        for chunk in plan.chunks:
            key, start, count = chunk.sequence.id, chunk.start, chunk.num_tokens
            life = self.alive[key]
            if life.computed is None:
                assert life.announced in (start, None), "another number of cached tokens than announced"
                life.announced = None
                life.computed = self._cached(life, start)
            assert start == life.computed, "a gap in a prompt"
            life.computed = end = start + count
            assert chunk.final == (end == life.target)
            assert 0 < count <= life.target - start
            self.published.update(life.request.block_hashes[: end // self.limits.block_size])
            if chunk.final:
                self._sample(plan, life)
                finished.append(key)
            tokens += count
            context += end
            pairs += sum(range(start + 1, end + 1))
        assert (plan.num_prefill_tokens, plan.prefill_context, plan.prefill_pairs) == (tokens, context, pairs)
        return finished


def summary(turn, members):
    """A turn in plain values, to compare with another's."""
    return {
        "plans": [_plain(plan, members) for plan in turn.plans],
        "events": list(turn.events),
        "wait": turn.wait,
    }


def _plain(plan, members):
    return {
        "id": plan.id,
        "chunks": [(chunk.sequence.id, chunk.start, chunk.num_tokens, chunk.final) for chunk in plan.chunks],
        "decode": members.get(plan.id, []),
        "joined": [(entry.sequence.id, entry.previous, entry.num_output_tokens) for entry in plan.joined],
        "grown": [(sequence.id, block) for sequence, block in plan.grown],
        "context": (plan.prefill_pairs, plan.prefill_context, plan.decode_context),
        "free": plan.num_free_blocks,
        "preempted": list(plan.preempted),
    }
