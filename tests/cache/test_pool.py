"""The pool against a naive model that copies every sequence: any sequence of forks, writes, truncations, releases."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from limber_fast.cache import CacheFull, PagePool

PAGES, SIZE = 40, 8


def _pool(pages=PAGES, layers=2):
    pool = PagePool(layers, 1, 2, dtype=torch.float32, budget_bytes=pages * layers * 2 * SIZE * 2 * 4)
    pool.storage.fill_(torch.nan)
    return pool


def _write(pool, sequence, tokens):
    """Stands for a step: puts `tokens` where a batch says they go."""
    batch = pool.batch([sequence], [len(tokens)])
    for i, token in enumerate(tokens, sequence.length - len(tokens)):
        pool.storage[:, batch.page_table[0, i // SIZE], :, :, i % SIZE] = token


def _read(pool, sequence):
    held = pool.storage[:, sequence.pages].permute(0, 2, 3, 5, 1, 4).flatten(4)[..., : sequence.length]
    assert (held == held[:1, :1, :1, :1]).all()  # every layer, head, K and V
    return held[0, 0, 0, 0].tolist()


class PoolMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.pool, self.model, self.next = _pool(), {}, 0.0

    def _fresh(self, n):
        self.next += n
        return [self.next - n + i for i in range(n)]

    @rule(target=sequences)
    def make(self):
        sequence = self.pool.sequence()
        self.model[sequence] = []
        return sequence

    @rule(sequence=sequences, n=st.integers(0, 20))
    def write(self, sequence, n):
        tokens = self._fresh(n)
        before = (list(sequence.pages), sequence.length, self.pool.stats())
        try:
            _write(self.pool, sequence, tokens)
        except CacheFull:
            assert before == (sequence.pages, sequence.length, self.pool.stats())
        else:
            self.model[sequence] += tokens

    @rule(target=sequences, sequence=sequences, keep=st.floats(0, 1))
    def fork(self, sequence, keep):
        before = self.pool.stats()
        length = round(keep * sequence.length)
        child = sequence.fork(length)
        assert self.pool.stats() == before | {"forks": before["forks"] + 1}
        self.model[child] = self.model[sequence][:length]
        return child

    @rule(sequence=sequences, keep=st.floats(0, 1))
    def truncate(self, sequence, keep):
        length = round(keep * sequence.length)
        sequence.truncate(length)
        self.model[sequence] = self.model[sequence][:length]

    @rule(sequence=consumes(sequences))
    def release(self, sequence):
        sequence.release()
        del self.model[sequence]

    @precondition(lambda self: len(self.model) > 1)
    @rule(n=st.integers(1, 9))
    def write_all(self, n):
        """All sequences in one batch: several copies of one page at once."""
        sequences = list(self.model)
        try:
            batch = self.pool.batch(sequences, [n] * len(sequences))
        except CacheFull:
            return
        for row, sequence in enumerate(sequences):
            tokens = self._fresh(n)
            for i, token in enumerate(tokens, sequence.length - n):
                self.pool.storage[:, batch.page_table[row, i // SIZE], :, :, i % SIZE] = token
            self.model[sequence] += tokens

    @invariant()
    def contents_are_those_of_copies(self):
        for sequence, tokens in self.model.items():
            assert _read(self.pool, sequence) == tokens

    @invariant()
    def counts_are_those_of_the_holders(self):
        held = [page for sequence in self.model for page in sequence.pages]
        assert self.pool._holders == [held.count(page) for page in range(PAGES)]
        assert sorted(self.pool._free) == [page for page in range(PAGES) if page not in held]
        assert self.pool.stats()["pages"] == len(set(held))
        assert all(len(s.pages) == -(-s.length // SIZE) for s in self.model)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_fork_copies_nothing_before_it_writes_and_one_page_then():
    pool = _pool()
    trunk = pool.sequence()
    _write(pool, trunk, [1.0] * 21)
    used = pool.stats()["pages"]
    forks = [trunk.fork() for _ in range(5)]
    assert pool.stats() == {**pool.stats(), "pages": used, "forks": 5, "copied_pages": 0}
    for i, fork in enumerate(forks):
        _write(pool, fork, [10.0 + i])
    assert pool.stats()["copied_pages"] == 5 and pool.stats()["pages"] == used + 5
    _write(pool, trunk, [2.0])  # its sole holder by now
    assert pool.stats()["copied_pages"] == 5
    assert _read(pool, forks[3]) == [1.0] * 21 + [13.0] and _read(pool, trunk) == [1.0] * 21 + [2.0]


def test_errors_name_what_is_wrong():
    pool, other = _pool(2), _pool(2)
    sequence = pool.sequence()
    with pytest.raises(CacheFull, match=r"^PagePool: 3 pages of 8 tokens are wanted and 2 of 2 are free; release"):
        pool.batch([sequence], [17])
    with pytest.raises(ValueError, match=r"^PagePool: sequences must be different ones; got one of them twice; fork"):
        pool.batch([sequence, sequence], [1, 1])
    with pytest.raises(ValueError, match=r"^PagePool: sequence must be of this pool; got a sequence of another"):
        other.batch([sequence], [1])
    with pytest.raises(ValueError, match=r"^PagePool: queries must have one number per sequence; got 1 sequences and"):
        pool.batch([sequence], [1, 1])
    with pytest.raises(ValueError, match=r"^PagePool: queries must not be negative; got -1"):
        pool.batch([sequence], [-1])
    with pytest.raises(ValueError, match=r"^Sequence: length must lie between 0 and the 0 tokens there are; got 3"):
        sequence.fork(3)
    sequence.release()
    sequence.release()
    with pytest.raises(ValueError, match=r"^Sequence: sequence must hold its pages; got a released one; make a ne"):
        sequence.fork()
    with pytest.raises(ValueError, match=r"^PagePool: budget_bytes must hold at least one page of 256 bytes; got 100"):
        PagePool(2, 1, 2, dtype=torch.float32, budget_bytes=100)


def test_context_manager_releases():
    pool = _pool()
    with pytest.raises(KeyError), pool.sequence() as sequence:
        _write(pool, sequence, [1.0] * 9)
        raise KeyError
    assert pool.stats()["pages"] == 0


def test_threads_share_a_pool():
    pool, errors = _pool(400), []
    trunk = pool.sequence()
    _write(pool, trunk, [0.0] * 13)

    def work(name):
        try:
            for i in range(60):
                with trunk.fork(i % 14) as fork:
                    _write(pool, fork, [name + 1.0] * (i % 11))
                    with fork.fork() as nested:
                        _write(pool, nested, [name + 0.5] * 3)
                        assert _read(pool, nested) == [0.0] * (i % 14) + [name + 1.0] * (i % 11) + [name + 0.5] * 3
                    assert _read(pool, fork) == [0.0] * (i % 14) + [name + 1.0] * (i % 11)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and pool.stats()["pages"] == 2 and pool._holders.count(1) == 2
