"""What a compiled kernel must keep to on each chip, read from the code alone."""

from __future__ import annotations

from limber_fast.kernels.catalogue import Case
from limber_fast.report.aot import chips, offsets
from limber_fast.report.aot.build import Build, compile_case


def gate(case: Case, target: str) -> list[str]:
    """The reasons why this build would fail, crawl or overflow on the target; empty where there is none.

    Checked: shared memory within what a block may have (Triton compiles more without a word), no spills, registers of a
    whole block within the register file, the chip's own tensor-core instruction where the case has products (sm_90 runs
    that of sm_80 too, at a fraction of its rate), 64-bit row offsets.
    """
    build = compile_case(case, target)
    chip = chips.CHIPS[target]
    failures = [*_memory(build, chip), *_registers(build, chip), *offsets.narrow_offsets(build.asm["ttir"])]
    if case.tensor_core and not set(chip.tensor_instructions) & set(build.tensor_core):
        found = f"found {', '.join(build.tensor_core)}" if build.tensor_core else "none found"
        failures.append(f"tensor-core instruction: expected {' or '.join(chip.tensor_instructions)}, {found}")
    return [f"{case.name} on {target}: {failure}" for failure in failures]


def _memory(build: Build, chip: chips.Chip) -> list[str]:
    if build.shared <= chip.shared_per_block:
        return []
    return [f"{build.shared} bytes of shared memory; a block has {chip.shared_per_block}"]


def _registers(build: Build, chip: chips.Chip) -> list[str]:
    failures = []
    if build.spill_loads or build.spill_stores or build.stack:
        spilled = f"{build.spill_loads} loads, {build.spill_stores} stores, {build.stack} bytes of stack per thread"
        failures.append(f"spills: {spilled}")
    if chips.occupancy(chip, build.registers, 0, build.threads).blocks == 0:
        failures.append(
            f"{build.registers} registers in {build.threads} threads; the register file has {chips.REGISTERS_PER_SM}"
        )
    return failures
