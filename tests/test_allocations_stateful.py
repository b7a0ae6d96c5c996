"""Any order of what can be done to buffers and reservations, against a model of who holds what."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gcma_shm import layout
from gcma_shm.broker import allocations as allocations_module
from gcma_shm.broker.allocations import HAND_OVER_MAX_S
from gcma_shm.broker.table import Allocation
from gcma_shm.errors import ArenaExhausted, BufferExists, NoSuchBuffer, QuotaExceeded, StaleHandle
from gcma_shm.layout import BUFFER, RESERVATION
from tests.books import CLIENTS, PAGE, Clock, Worker, allocate, allocations_of, claim_word, fork
from tests.conftest import private_bare
from tests.invariants import check_tables


@dataclass
class Token:
    """What the model knows of a handle under way. `giver` 0: it has died."""

    deadline: float
    of_claim: bool
    giver: int
    after_end: float

    def lose(self, giver: int, now: float) -> None:
        if self.giver == giver:
            self.giver, self.deadline = 0, min(self.deadline, now + self.after_end)


@dataclass
class Known:
    """What the model knows of one allocation."""

    made: Allocation
    pages: int
    name: str | None
    holders: set[int]
    tokens: dict[int, Token] = field(default_factory=dict)
    maker: int = 0
    word: int = 0
    shared: bool = False
    claimers: set[int] = field(default_factory=set)  # whoever has the claim, shared or not

    def who(self) -> set[int]:
        """Who is charged: for holding it, for a part in a claim that is shared, for a handle that has not arrived."""
        givers = {token.giver for token in self.tokens.values()} - {0}
        return self.holders | givers | (self.claimers if self.shared else set())

    def leave_claim(self, client: int) -> None:
        self.claimers.discard(client)
        self.settle()

    def settle(self) -> None:
        """Nobody has the claim any more?"""
        if self.maker and not self.claimers and not any(token.of_claim for token in self.tokens.values()):
            self.maker, self.shared = 0, False


class Machine(RuleBasedStateMachine):
    """Any order of allocating, reserving, claiming, handing over, forking, freeing and dying: who holds what is as in the model."""

    clients = st.sampled_from(CLIENTS)
    which = st.integers(0, 1 << 10)

    def __init__(self) -> None:
        super().__init__()
        self.bare = private_bare({"a": 60 * PAGE, "b": "320K,share=75", "c": "80K,cache=off"}, 1 << 20)
        self.allocations = allocations_of(self.bare, 70 * PAGE)
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(allocations_module, "time", self.clock)
        self.workers = {number: Worker(self.bare, number) for number in CLIENTS}
        self.known: list[Known] = []
        self.quotas: dict[int, int | None] = {}
        self.freed = 0
        self.allocations.when_freed = self._note_freed

    def _note_freed(self) -> None:
        self.freed += 1

    def _held(self, client: int) -> int:
        return sum(known.pages for known in self.known if client in known.who())

    def _over(self, client: int, pages: int) -> bool:
        quota = self.quotas.get(client, 70 * PAGE)
        return quota is not None and (self._held(client) + pages) * PAGE > quota

    def _bury(self) -> None:
        """What nobody holds is gone."""
        gone = [known for known in self.known if not known.who() and not known.tokens]
        self.known = [known for known in self.known if known.who() or known.tokens]
        assert self.freed >= len(gone), "freed, and nobody in line was told"
        for known in gone:
            with pytest.raises(StaleHandle):
                self.allocations.attach(2, known.made.number)
        self.freed = 0

    def _pick(self, which: int) -> Known:
        return self.known[which % len(self.known)]

    @rule(
        client=clients,
        nbytes=st.integers(1, 40 * PAGE),
        area=st.none() | st.sampled_from(["a", "b", "c"]),
        align=st.sampled_from([None, 1, 8 * PAGE]),
        reserved=st.booleans(),
        name=st.none() | st.sampled_from("xyz"),
    )
    def allocate(
        self, client: int, nbytes: int, area: str | None, align: int | None, reserved: bool, name: str | None
    ) -> None:
        pages = -(-nbytes // PAGE)
        kind = RESERVATION if reserved else BUFFER
        taken = name is not None and any(known.name == name for known in self.known)
        over = self._over(client, pages)
        try:
            made = allocate(self.allocations, client, nbytes, area, None, align, kind, name)
        except BufferExists:
            assert taken
        except QuotaExceeded:
            assert over
        except ArenaExhausted as error:
            assert (align or 0) > 1 or error.largest_free < error.requested  # noqa: PT017 - one of several right answers
        else:
            assert not taken
            assert not over
            self.known.append(Known(made, pages, name, {client}))

    @rule(client=clients, offset=st.integers(0, 59), pages=st.integers(1, 30))
    def allocate_there(self, client: int, offset: int, pages: int) -> None:
        with contextlib.suppress(ArenaExhausted, ValueError, QuotaExceeded):
            made = allocate(self.allocations, client, pages * PAGE, "a", offset)
            self.known.append(Known(made, pages, None, {client}))

    @precondition(lambda self: self.known)
    @rule(client=clients, which=which)
    def free(self, client: int, which: int) -> None:
        known = self._pick(which)
        if client not in known.holders:
            with pytest.raises(NoSuchBuffer):
                self.allocations.free(client, known.made.number)
            return
        self.allocations.free(client, known.made.number)
        known.holders.discard(client)
        if known.maker == client and not known.shared:
            known.leave_claim(client)
        self._bury()

    @precondition(lambda self: self.known)
    @rule(client=clients, which=which, by_name=st.booleans())
    def attach(self, client: int, which: int, by_name: bool) -> None:
        known = self._pick(which)
        over = client not in known.who() and self._over(client, known.pages)
        try:
            if by_name and known.name is not None:
                found = self.allocations.attach_name(client, known.name)
            else:
                found = self.allocations.attach(client, known.made.number)
        except QuotaExceeded:
            assert over
        else:
            assert not over
            assert found is known.made
            known.holders.add(client)

    @precondition(lambda self: self.known)
    @rule(
        client=clients,
        which=which,
        seconds=st.sampled_from([0, 1, 5, 10**9]),
        of_claim=st.booleans(),
        after_end=st.sampled_from([0, 2, float("inf")]),
    )
    def hand_over(self, client: int, which: int, seconds: int, of_claim: bool, after_end: float) -> None:
        known = self._pick(which)
        claims = [(known, client) for known in self.known for client in sorted(known.claimers)]
        of_claim = of_claim and bool(claims)
        if of_claim:
            known, client = claims[which % len(claims)]
        claim = known.word >> 17 if of_claim else 0
        if client not in known.who():
            with pytest.raises(NoSuchBuffer):
                self.allocations.hand_over(client, known.made.number, seconds, claim)
            return
        token = self.allocations.hand_over(client, known.made.number, seconds, claim, after_end)
        known.tokens[token] = Token(self.clock.now + min(seconds, HAND_OVER_MAX_S), of_claim, client, after_end)
        known.shared = known.shared or of_claim

    @precondition(lambda self: any(known.tokens for known in self.known))
    @rule(client=clients, which=which)
    def attach_with_a_handle(self, client: int, which: int) -> None:
        handles = [(known, token) for known in self.known for token in known.tokens]
        known, token = handles[which % len(handles)]
        of_claim = known.tokens[token].of_claim
        with pytest.raises(StaleHandle):
            self.allocations.attach(client, known.made.number, 0 if of_claim else (known.word >> 17) + 1, token)
        if client not in known.who() and self._over(client, known.pages):
            with pytest.raises(QuotaExceeded):
                self.allocations.attach(client, known.made.number, known.word >> 17 if of_claim else 0, token)
            return
        self.allocations.attach(client, known.made.number, known.word >> 17 if of_claim else 0, token)
        del known.tokens[token]
        (known.claimers if of_claim else known.holders).add(client)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 6.0, 3600.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.allocations.expire()
        for known in self.known:
            known.tokens = {token: told for token, told in known.tokens.items() if told.deadline > self.clock.now}
            known.settle()
        self._bury()

    @precondition(lambda self: any(known.made.kind == RESERVATION for known in self.known))
    @rule(which=which)
    def claim(self, which: int) -> None:
        """A client claims what it holds; the broker is not told."""
        could = [
            (known, client) for known in self.known if known.made.is_reservation for client in sorted(known.holders)
        ]
        if not could:
            return
        known, client = could[which % len(could)]
        made, word = self.workers[client].try_claim(known.made)
        assert made == (not known.maker)
        assert word & 0xFFFF == (known.maker or client)
        if made:
            known.maker, known.word, known.claimers = client, word, {client}

    @precondition(lambda self: any(known.claimers for known in self.known))
    @rule(which=which)
    def unclaim(self, which: int) -> None:
        claims = [(known, client) for known in self.known for client in sorted(known.claimers)]
        known, client = claims[which % len(claims)]
        lent = self.workers[client].lend(known.made, known.word)
        assert lent == (not known.shared)
        if not lent:
            self.allocations.free_claim(client, known.made.number, known.word >> 17)
        known.leave_claim(client)
        self._bury()

    def _share_all(self, parent: int) -> None:
        """What a client does to its claims before it forks."""
        for known in self.known:
            if parent in known.claimers:
                if known.maker == parent and not known.shared:
                    assert self.workers[parent].plane.share_claim(known.made.index, known.word)
                known.shared = True

    @rule(parent=clients, child=clients, which=which, claims_later=st.booleans(), fetched_all=st.booleans())
    def fork(self, parent: int, child: int, which: int, claims_later: bool, fetched_all: bool) -> None:
        """`claims_later`: and before the broker looks, it claims something and prepares another fork, which fails."""
        self._share_all(parent)
        fork(self.bare, self.allocations, parent, child, inherited=False)
        of_parent = [known for known in self.known if parent in known.claimers]
        if claims_later and parent != child:
            free = [one for one in self.known if one.made.is_reservation and parent in one.holders and not one.maker]
            for known in free[which % (len(free) + 1) :][:1]:
                word = self.workers[parent].claim(known.made)
                known.maker, known.word, known.claimers = parent, word, {parent}
                self._share_all(parent)
        held = [known for known in self.known if parent in known.holders]
        but_for = [] if fetched_all else held[which % (len(held) + 1) :][:1]
        self.allocations.inherit(parent, child, [known.made.number for known in but_for])
        if parent in self.quotas:
            self.quotas[child] = self.quotas[parent]
        for known in held:
            if known not in but_for:
                known.holders.add(child)
        for known in of_parent:
            known.claimers.add(child)

    @rule(client=clients, count=st.none() | st.integers(1, 3))
    def die(self, client: int, count: int | None) -> None:
        left = sum(client in known.who() for known in self.known)
        while True:
            left = 0 if count is None else max(left - count, 0)
            assert self.allocations.drop(client, count) == left
            self.allocations._check()
            if not left:
                break
        self.allocations.holders.forget(client)
        self.quotas.pop(client, None)
        for known in self.known:
            known.holders.discard(client)
            for token in known.tokens.values():
                token.lose(client, self.clock.now)
            known.leave_claim(client)
        self._bury()

    @rule(client=clients, which=which, forgets=st.booleans())
    def say_hello_again(self, client: int, which: int, forgets: bool) -> None:
        """With a list of all that it holds, or of all but one buffer whose reply was lost."""
        held = [known for known in self.known if client in known.holders]
        lost = held[which % len(held)] if held and forgets else None
        if lost is not None and lost.shared and client in {*lost.claimers, lost.maker}:
            lost = (
                None  # it cannot share a claim of what it does not know of; who made it and left it, has its own test
            )
        shares = [known.made.number for known in self.known if known.shared and client in known.claimers]
        self.allocations.reconcile(client, [known.made.number for known in held if known is not lost], shares)
        if lost is not None and client not in lost.claimers:
            lost.holders.discard(client)
        self._bury()

    @rule(client=clients, pages=st.none() | st.integers(0, 100))
    def set_quota(self, client: int, pages: int | None) -> None:
        self.quotas[client] = None if pages is None else pages * PAGE
        self.allocations.holders.set_quota(client, self.quotas[client])

    @rule(name=st.sampled_from("abc"), drained=st.booleans())
    def drain_or_resume(self, name: str, drained: bool) -> None:
        (self.allocations.drain if drained else self.allocations.resume)(name)

    @invariant()
    def check(self) -> None:
        self.allocations._check()
        for known in self.known:
            made = known.made
            assert made.holders == known.holders
            assert set(made.handed_over) == set(known.tokens)
            word = claim_word(self.bare, made)
            if made.kind == RESERVATION:
                assert word & 0xFFFF == known.maker
                assert bool(word & layout.CLAIM_SHARED) == known.shared
                if made.claim_generation == word >> 17:
                    assert made.claimers == known.claimers
        for client in CLIENTS:
            assert self.allocations.holders.held_bytes(client) == self._held(client) * PAGE
        assert [told["name"] for told in self.allocations.names()[0]] == sorted(
            known.name for known in self.known if known.name is not None
        )
        used = self.bare.arena.geometry.allocations_max - len(self.allocations._table._free)
        assert used == len(self.known), "an entry that is in use for nobody, or not in use for somebody"

    def teardown(self) -> None:
        check_tables(memoryview(self.bare.arena.memory), self.bare.arena.geometry)
        for client in CLIENTS:
            self.allocations.drop(client)
        self.clock.now += HAND_OVER_MAX_S
        self.allocations.expire()
        self.allocations._check()
        assert sorted(self.allocations._table._free) == list(range(self.bare.arena.geometry.allocations_max))
        for name in "abc":
            self.allocations.resume(name)
        for info in self.allocations.describe():
            assert info["free"] == info["size"]
            assert info["largest_free"] == info["size"] * info["share"] // 100
            assert (info["held"], info["reserved"], info["lent"]) == (0, 0, 0)
        check_tables(memoryview(self.bare.arena.memory), self.bare.arena.geometry)
        self.patch.undo()


@pytest.mark.timeout(600)
def test_any_order_keeps_the_books() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=200, stateful_step_count=30, deadline=None))
