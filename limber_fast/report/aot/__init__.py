"""Triton kernels compiled ahead of time, on a machine that needs no GPU: what the code needs, and what it must keep to.

    build = compile_case(case, "sm_90")    # registers, spills, shared memory, instructions, PTX
    failures = gate(case, "sm_90")         # what would fail or crawl on that chip; empty when all is well

Cases come from `limber_fast.kernels.catalogue`. The compiler and the disassembler are those of Triton's own wheel.
"""

from limber_fast.report.aot.build import Build, compile_case
from limber_fast.report.aot.rules import gate

__all__ = ["Build", "compile_case", "gate"]
