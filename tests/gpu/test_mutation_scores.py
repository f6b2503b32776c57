"""Would the checks of the shipped kernels notice a fault? Mutation score of each, as compiled for each chip.

The check is that of the kernels' own tests: the public op, forward and backward, against float64, its outputs full of
NaN beforehand, here also with the executor's traps for races. Every mutant is one changed line of one kernel.

Last seen, of about 40 each, in percent (sm_80, sm_90):
  int8_linear            fwd 88, 93; grad 88, 92; bwd 95, 89; finish 98, 98; quantize 87, 85; outliers 98, 98;
                         bwd_finish 98, 98. From 69 to 76 for some before rows had extremes in places of their own.
  frozen_cross_entropy   chunk 88, 90; finish 87, 87; bwd 95, 95
  project_concat         fwd 93, 87; weight 92, 95; features 95, 90; norm 95, 95; norm_bwd 95, 95
  info_nce               fwd 95, 90; redo 95, 95; merge 100, 100; finish 86, 86; weights 85, 85; ds 88, 87; dual 97, 97;
                         gradient 98, 98; norm 92, 92; sigmoid 100, 100. fwd, redo and ds had 68 to 79 where no
                         positive lay off the diagonal and not every build had tiles to do over.
  prefix_attention       append 100; shared 92, 95; alone 85, 90; merge 88, before its tiles were searched for
Those of nvcc (test_mutation_scores_cuda.py):
  prefix_attention       parts 95, 92 (bf16), 92, 92 (fp16), 90, 88 (over int8); rest 85, 88 (bf16), 90, 90 (fp16),
                         88, 88 (over int8). 79 and 70 in bf16 before rows had several parts, sequences up to 15 new
                         tokens, logits that overflow beside a missed maximum, and values far from 1.
  page_copy              92, 92
  read_words             92, 92
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from gpu import test_frozen_cross_entropy_kernels as of_frozen_cross_entropy
from gpu import test_info_nce_kernels as of_info_nce
from gpu import test_int8_linear_kernels as of_int8_linear
from gpu import test_prefix_attention_kernels as of_prefix_attention
from gpu import test_project_concat_kernels as of_project_concat
from gpu.launching import send_to_triton
from gpu.ptx.mutate import Score, mutation_score
from gpu.replay import Launches, of_triton, recorded, replayed
from gpu.unobservable import unobservable
from limber_fast import frozen_cross_entropy, info_nce, int8_linear, prefix_attention, project_concat
from limber_fast.kernels import frozen_cross_entropy_launch, info_nce_launch
from limber_fast.reference.info_nce import info_nce as info_nce_reference
from limber_fast.reference.int8_linear import int8_linear as int8_linear_reference
from limber_fast.reference.prefix_attention import prefix_attention as prefix_attention_reference
from limber_fast.reference.project_concat import project_concat as project_concat_reference

GOAL, MUTANTS, LONGEST = 0.85, 40, 20_000
TARGETS = ("sm_80", "sm_90")
PROGRAMS = {"info_nce": 3, "project_concat": 24, "int8_linear": 12, "frozen_cross_entropy": 12, "prefix_attention": 1}


@dataclass(frozen=True)
class Problem:
    """One call of an op: `results(function, dtype)` are its outputs and gradients."""

    results: Callable[..., list[Tensor]]
    ours: Callable[..., Any]
    reference: Callable[..., Any]

    def true(self) -> list[Tensor]:
        return self.results(self.reference, torch.float64)


def _towers(**call: Any) -> Problem:
    def results(function: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        found = of_info_nce._gradients(function, of_info_nce.Call(**call), dtype)
        if "variant" not in call.get("options", {}):
            del found["logit_bias"]  # it cancels in the softmax: its gradient is rounding, if anything
        return list(found.values())

    return Problem(results, info_nce, info_nce_reference)


def _prompts(**call: Any) -> Problem:
    return Problem(of_project_concat.Call(**call).run, project_concat, project_concat_reference)


def _layer(**call: Any) -> Problem:
    made = of_int8_linear.Call(**call)
    weight = of_int8_linear.weight_of(made.n, made.k, made.dtype)
    rows = of_int8_linear.on_gpu(weight, "sm_80")
    return Problem(
        made.run, lambda x, bias, **options: int8_linear(x, rows, bias, **options),
        lambda x, bias, **options: int8_linear_reference(x, weight.integers(), weight.scales, bias, **options),
    )  # fmt: skip


def _head(**call: Any) -> Problem:
    made = of_frozen_cross_entropy.Call(**call)
    rows = of_int8_linear.on_gpu(made.weight(), "sm_80")
    return Problem(
        made.run,
        lambda hidden, bias, labels: frozen_cross_entropy(hidden, rows, bias, labels, reduction="none"),
        made.exact,
    )


def _step(
    members: tuple[tuple[int, int], ...], dims: int, dtype: torch.dtype, *, prefixes: tuple[int, ...] = (16, 160),
    heads: int = 2, rotary_dims: int = 6, kind: Any = of_prefix_attention.Call, turned: bool = False, **call: Any,
) -> Problem:  # fmt: skip
    """Forks of nested prefixes; out, and the pages. turned: rotary positions are not the places."""
    made = kind(dtype, heads, dims, rotary_dims=rotary_dims, **call)
    sequences, queries = made.forked(prefixes, members, cases.permutation(len(members)))
    positions = [7 * i % 501 for i in range(sum(queries))] if turned else None
    batch, before = made.pool.batch(sequences, queries, positions=positions), made.pool.layer(0).clone()
    where = (queries, [s.length for s in sequences], [s.pages for s in sequences])

    def results(function: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        rows = [x.to(dtype or made.dtype) for x in made.rows(batch.tokens)]
        out, pages = function(*rows, before.to(dtype or made.dtype, copy=True))
        return [out, pages.nan_to_num()]  # unused places are NaN

    def ours(q: Tensor, k: Tensor, v: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        return prefix_attention(q, k, v, pages, batch, rotary=made.rotary), pages

    def reference(*rows: Tensor) -> tuple[Tensor, Tensor]:
        return prefix_attention_reference(*rows, *where, positions=positions, rotary=made.rotary)

    return Problem(results, ours, reference)


PROBLEMS = {
    "info_nce": [
        # Nothing may be read between the towers' rows.
        _towers(shape=(130, 130, 72), gap=16),
        _towers(shape=(130, 130, 72), scale_by=-1.0),
        # The losses are so small, or their logarithms so plain, that the last digits of those show.
        _towers(data="converged", shape=(130, 130, 72)),
        _towers(shape=(190, 190, 72), scaled=1e-3),
        # Tiles done over: the zeros past the ends would be large, one tile's only element is a positive. Then maxima
        # that must not be missed; all stages of a pipeline.
        _towers(data="opposed", shape=(129, 129, 72), scaled=0.4),
        _towers(data="peak", shape=(130, 130, 72)),
        _towers(data="peak_column", shape=(130, 130, 72)),
        _towers(data="wild", shape=(130, 130, 328)),
        _towers(data="peaks", shape=(130, 130, 72)),
        # Positives off the diagonal, where every register of a tile may hold one.
        *(
            _towers(
                data=data, shape=(n, n, d), scaled=3.0, scale_by=by,
                options={"normalize": True, "labels": cases.permutation(n)},
            )
            for data, n, d, by in (
                ("unit", 130, 328, 1.0), ("converged", 130, 72, 1.0), ("opposed", 129, 72, 1.0), ("peak", 130, 72, 1.0),
                ("peak_column", 130, 72, 1.0), ("peaks", 130, 72, 4.0),
            )
        ),
        _towers(shape=(130, 130, 72), options={"variant": "sigmoid"}),
    ],
    "project_concat": [
        _prompts(n_images=3, k=50, d=328, e=136, dropout_p=0.3),
        # Rows of more than one block of the norm's kernels; steps enough that the ring of TMA buffers is filled again.
        _prompts(n_images=3, k=50, d=200, e=1100, dropout_p=0.3, norm=True, int8=True),
    ],
    "int8_linear": [
        # Tiles nearly full, so that few lanes are idle; the gradient in fp16, which a missed maximum carries past its
        # range; operands by TMA, in bf16.
        _layer(m=70, n=250, k=330, dtype=torch.float16),
        _layer(m=70, n=250, k=330, dtype=torch.float16, spread=True),
        _layer(m=120, n=240, k=352),
        # Rows of more than one block of the kernels that take them whole; reductions that several programs share.
        _layer(m=13, n=120, k=2500),
        _layer(m=60, n=120, k=2100, options=of_int8_linear.W8A8),
        _layer(m=60, n=120, k=2100, options=of_int8_linear.W8A8, spread=True),
        _layer(m=60, n=2100, k=250, activation=None, options=of_int8_linear.W8A8),
        _layer(m=60, n=120, k=250, dtype=torch.float32, activation=None),
        _layer(m=60, n=120, k=250, dtype=torch.float32, activation=None, broken="x"),
        _layer(m=60, n=120, k=250, dtype=torch.float32, activation=None, broken="grad"),
    ],
    "frozen_cross_entropy": [
        # Several chunks of the vocabulary; maxima that must not be missed, logits beyond fp32, and losses so small that
        # the last digits of a logarithm show.
        *(_head(shape=(33, 1000, 120), tokens=tokens) for tokens in ("", "peaks", "overflows", "sure")),
        _head(shape=(9, 250, 120), dtype=torch.float32, weight_by=8.0),
        _head(shape=(9, 250, 120), dtype=torch.float32, tokens="sure"),
    ],
    "prefix_attention": [
        # Members of more than one tile, rows of more than one tile, several splits, pages of another size, and tokens
        # enough that every stage of the pipelines is used again.
        _step((*((i % 5, 1) for i in range(18)), (335, 3)), 32, torch.float16),
        _step(((3, 2), (75, 20), (250, 1)), 48, torch.float32, page_size=5),
    ],
}


def _errors_of_numbers(found: Tensor, true: Tensor) -> tuple[float, float]:
    """In both norms; infinite unless NaN and infinities are where they truly are."""
    numbers = true.isfinite()
    if not torch.equal(*(torch.where(x.isfinite(), 0.0, x.double()).nan_to_num(0.5) for x in (found, true))):
        return math.inf, math.inf
    return cases.errors(found[numbers], true[numbers])


class Sound:
    """A problem, the launches of its compiled kernels, and their errors in both norms of every output."""

    def __init__(self, problem: Problem, launches: Launches) -> None:
        self.problem, self.launches, self.true = problem, launches, problem.true()
        with recorded(launches, races=True) as self.steps:
            self.errors = self._errors(problem.results(problem.ours))

    def _errors(self, found: list[Tensor]) -> list[float]:
        return [error for x, y in zip(found, self.true, strict=True) for error in _errors_of_numbers(x, y)]

    def passes(self, text: str, changed: str, races: bool) -> bool:
        """No error is more than twice that of the sound kernels."""
        with replayed(self.launches, self.steps, text, changed, races=races, max_instructions=LONGEST) as replay:
            found = self.problem.results(self.problem.ours)
        return not replay.differs or all(
            error <= 2 * before for error, before in zip(self._errors(found), self.errors, strict=True)
        )


class Check:
    """Problems of an op on one chip."""

    def __init__(self, op: str, problems: list[Problem], launches: Launches) -> None:
        self.op, self.sound = op, [Sound(problem, launches) for problem in problems]

    def kernels(self) -> dict[str, list[str]]:
        """The distinct builds of every kernel of the op: those it borrows have a check of their own."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for sound in self.sound:
            for step in sound.steps:
                if step.kernel.startswith(self.op):
                    found[step.kernel][step.text] = None
        return {name: list(texts) for name, texts in found.items()}

    def passes(self, text: str, changed: str) -> bool:
        """Wherever `text` is launched. Races are looked for last, as that runs one block at a time."""
        concerned = [sound for sound in self.sound if any(step.text == text for step in sound.steps)]
        return all(sound.passes(text, changed, races) for races in (False, True) for sound in concerned)

    def score(self, name: str, builds: list[str]) -> Score:
        """Of one kernel, over all its builds."""
        total = Score()
        for text in builds:
            total += mutation_score(
                text, lambda changed, text=text: self.passes(text, changed), count=-(-MUTANTS // len(builds)),
                race_checked=True, unobservable=unobservable(name),
            )  # fmt: skip
        return total

    def reach_the_goal(self) -> None:
        """Every kernel's score is printed and at least GOAL."""
        assert all(error < 2e-2 for sound in self.sound for error in sound.errors)
        scores = {}
        for name, builds in self.kernels().items():
            scores[name] = self.score(name, builds)
            print(f"\n{name} ({len(builds)} builds): {scores[name].report()}", flush=True)
        low = {name: f"{score.rate:.0%}" for name, score in scores.items() if score.rate < GOAL or score.total < 20}
        assert not low, low


def test_a_replay_takes_from_the_record_what_no_change_reaches(monkeypatch, poisoned):
    send_to_triton(monkeypatch, "project_concat", "sm_80")
    launches = of_triton("sm_80")
    sound = Sound(_prompts(), launches)
    problem, texts = sound.problem, {step.kernel: step.text for step in sound.steps}
    with recorded(launches):
        expected = problem.results(problem.ours)
    for kernel, output in (("project_concat_fwd_kernel", 0), ("project_concat_weight_kernel", 2)):
        text = texts[kernel]
        with replayed(launches, sound.steps, text, text) as replay:
            found = problem.results(problem.ours)
        assert not replay.differs and all(map(torch.equal, found, expected))
        changed = text.replace("0f00000000", "0f3F800000")  # products begin at 1
        with replayed(launches, sound.steps, text, changed) as replay:
            found = problem.results(problem.ours)
        same = [torch.equal(*pair) for pair in zip(found, expected, strict=True)]
        assert replay.differs and same.index(False) == output
        assert not sound.passes(text, changed, races=False)


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", PROBLEMS)
def test_every_kernel_of_an_op(op, target, monkeypatch, poisoned):
    send_to_triton(monkeypatch, op, target, programs=PROGRAMS[op])
    monkeypatch.setattr(frozen_cross_entropy_launch, "HELD", 1)  # the smallest chunks
    monkeypatch.setattr(info_nce_launch, "PROGRAMS", 1)  # strips of several tiles
    Check(op, PROBLEMS[op], of_triton(target)).reach_the_goal()
