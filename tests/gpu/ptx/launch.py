"""Run a case of the kernel catalogue: compile it for a target and execute its PTX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limber_fast.kernels.catalogue import Case
from limber_fast.report.aot import compile_case

from .execute import Counts, execute


def run_case(case: Case, target: str, grid: Sequence[int], arguments: Mapping[str, Any], **options: Any) -> Counts:
    """Launch `case` as compiled for `target` on CPU tensors.

    arguments: by the kernel's own names, without its constants.
    options: of `execute`; `ptx` runs another text than the compiled one, such as a mutant.
    """
    build = compile_case(case, target)
    values = [arguments[name] for name in case.kernel.arg_names if name not in case.constants]
    text = options.pop("ptx", build.ptx)
    return execute(
        text, grid, (build.threads,), values, shared_bytes=build.metadata.shared,
        scratch_bytes=build.metadata.global_scratch_size, **options,
    )  # fmt: skip
