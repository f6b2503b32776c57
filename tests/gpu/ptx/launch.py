"""Run a case of the kernel catalogue: compile it for a target and execute its PTX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton

from limber_fast.kernels.catalogue import Case
from limber_fast.report.aot import compile_case

from .execute import Counts, execute
from .tma import descriptor_arguments


def run_case(case: Case, target: str, grid: Sequence[int], arguments: Mapping[str, Any], **options: Any) -> Counts:
    """Launch `case` as compiled for `target` on CPU tensors.

    arguments: by the kernel's own names, without its constants; a TensorDescriptor where the case has one.
    options: of `execute`; `ptx` runs another text than the compiled one, such as a mutant.
    """
    build = compile_case(case, target)
    described = iter(getattr(build.metadata, "tensordesc_meta", None) or ())
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    options.setdefault("copies_need_fence", version >= (3, 8))
    values: list[Any] = []
    tensors = list(options.pop("tensors", ()))
    for name in case.kernel.arg_names:
        if name in case.constants:
            continue
        value = arguments[name]
        if case.signature[name].startswith("tensordesc"):
            tensors.append(value.base)
            values += descriptor_arguments(value, next(described))
        else:
            values.append(value)
    return execute(
        options.pop("ptx", build.ptx), grid, (build.threads,), values, shared_bytes=build.metadata.shared,
        scratch_bytes=build.metadata.global_scratch_size, tensors=tensors, **options,
    )  # fmt: skip
