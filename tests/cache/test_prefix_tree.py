"""The tree against a list of all that was inserted: what it finds, what it may forget, and what it must never."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from limber_fast.cache import CacheFull, PagePool, PrefixTree, contents

SIZE = 8
PROMPTS = st.lists(st.integers(0, 2), max_size=30)  # three tokens: prefixes are often shared, also within a page


def _pool(pages):
    pool = PagePool(1, 1, 2, dtype=torch.float64, budget_bytes=pages * 2 * SIZE * 2 * 8)
    pool.storage.fill_(torch.nan)
    return pool


def _write(pool, sequence, prompt):
    """The rest of `prompt` as a model would write it: a token's entry depends on all before it."""
    start = sequence.length
    batch = pool.batch([sequence], [len(prompt) - start])
    for i in range(start, len(prompt)):
        pool.storage[:, batch.page_table[0, i // SIZE], :, :, i % SIZE] = _entry(prompt[: i + 1])


def _entry(prefix):
    return float(hash(tuple(prefix)) % (1 << 52))


def _check(pool, sequence, prompt):
    for i in range(sequence.length):
        assert (pool.storage[:, sequence.pages[i // SIZE], :, :, i % SIZE] == _entry(prompt[: i + 1])).all()


def _common(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


class TreeMachine(RuleBasedStateMachine):
    running = Bundle("running")

    @initialize(pages=st.sampled_from([6, 12, 400]))
    def make(self, pages):
        self.pool, self.pages, self.inserted, self.held = _pool(pages), pages, [], {}
        self.tree = PrefixTree(self.pool)

    @rule(target=running, prompt=PROMPTS, leave=st.integers(0, 2), keep=st.booleans())
    def serve(self, prompt, leave, keep):
        """A request: what is known is found, the rest is written, and all of it becomes known."""
        sequence = self.tree.find(prompt, leave=leave)
        best = max((_common(prompt[: max(0, len(prompt) - leave)], other) for other in self.inserted), default=0)
        assert sequence.length == best if self.pages == 400 else sequence.length <= best
        _check(self.pool, sequence, prompt)
        try:
            _write(self.pool, sequence, prompt)
        except CacheFull:
            # Only where those that run need all pages themselves: everything else was given up before.
            in_use = {page for s in [*self.held, sequence] for page in s.pages}
            more = -(-len(prompt) // SIZE) - len(sequence.pages) + 1
            assert len(in_use) + more > self.pages
            sequence.release()
        else:
            _check(self.pool, sequence, prompt)
            if keep:
                self.tree.insert(sequence, prompt)
                self.inserted.append(prompt)
            self.held[sequence] = prompt
        return sequence

    @rule(sequence=consumes(running))
    def finish(self, sequence):
        sequence.release()
        self.held.pop(sequence, None)

    @rule()
    def clear(self):
        self.tree.clear()
        self.inserted.clear()

    @invariant()
    def sequences_are_untouched_and_counts_right(self):
        if not hasattr(self, "tree"):
            return
        for sequence, prompt in self.held.items():
            _check(self.pool, sequence, prompt)
        held = [page for s in self.held for page in s.pages] + [node.page for node in self.tree._used]
        assert self.pool._holders == [held.count(page) for page in range(self.pages)]
        order = list(self.tree._used)
        for place, node in enumerate(order):
            assert node.parent is self.tree._root or order.index(node.parent) > place
        stats = self.tree.stats()
        assert stats["kept_pages"] == len(order) and stats["kept_bytes"] == len(order) * self.pool.page_bytes


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_least_recently_used_goes_first_and_never_what_is_in_use():
    pool = _pool(6)
    tree = PrefixTree(pool)
    prompts = [[n] * 16 for n in range(3)]
    for prompt in prompts:
        with tree.find(prompt) as sequence:
            _write(pool, sequence, prompt)
            tree.insert(sequence, prompt)
    running = tree.find(prompts[1], leave=0)  # in use
    tree.find(prompts[0], leave=0).release()  # used again: the third is the oldest now
    with pool.sequence() as sequence:
        _write(pool, sequence, [7] * 16)
        assert tree.stats()["evicted_pages"] == 2
        assert [tree.find(p, leave=0).length for p in prompts] == [16, 16, 0]
        _check(pool, running, prompts[1])
        with pytest.raises(CacheFull):
            pool.batch([pool.sequence()], [8 * 3])


def test_one_bit_of_a_soft_prompt_is_a_miss():
    pool = _pool(50)
    tree = PrefixTree(pool)
    soft = torch.randn(10, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = contents(soft, [5, 6, 7])
    sequence = tree.find(tokens)
    _write(pool, sequence, tokens)
    tree.insert(sequence, tokens)
    other = soft.clone()
    other.view(torch.int16)[4, 9] ^= 1
    assert tree.find(contents(soft.clone(), torch.tensor([5, 6, 7])), leave=0).length == 13
    assert tree.find(contents(other, [5, 6, 7]), leave=0).length == 4
    assert tree.find(contents(soft.float(), [5, 6, 7]), leave=0).length == 0
    assert tree.find([*range(10), 5, 6, 7], leave=0).length == 0
    assert tree.find(tokens).length == 12  # the last token is left to compute
    assert tree.stats() == tree.stats() | {"lookups": 6, "hits": 3, "hit_tokens": 29, "missed_tokens": 49}


def test_errors():
    tree = PrefixTree(_pool(4))
    with pytest.raises(ValueError, match=r"^PrefixTree: tokens must be at most the 0 that the sequence holds; got 2"):
        tree.insert(tree.find([]), [1, 2])
    with pytest.raises(ValueError, match=r"^PrefixTree: a part must be token ids or embeddings \[S, E\]; got shape"):
        contents(torch.ones(3))


def test_threads_share_a_tree():
    pool, errors = _pool(60), []
    tree = PrefixTree(pool)

    def work(name):
        generator = torch.Generator().manual_seed(name)
        try:
            for _ in range(80):
                length = int(torch.randint(30, (), generator=generator))
                prompt = torch.randint(2, (length,), generator=generator).tolist()
                with tree.find(prompt) as sequence:
                    _write(pool, sequence, prompt)
                    tree.insert(sequence, prompt)
                    _check(pool, sequence, prompt)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    tree.clear()
    assert pool.stats()["pages"] == 0
