"""Limits and peak rates of the GPUs that kernels are compiled for, each rate with its source.

Limits are those of the CUDA C++ Programming Guide, "Compute Capabilities" (technical specifications and arithmetic
throughput). A rate is *measured* (seen once on a lent GPU), from the vendor's *datasheet*, or *assumed*.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
WARP_PRODUCTS = ("HMMA", "IMMA")  # of a single warp: every chip runs them, from sm_90 on at a fraction of the full rate
REGISTERS_PER_SM = 65536
REGISTER_UNIT = 256  # registers are handed to a warp in multiples of this
SUB_PARTITIONS = 4
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # kept by the system in every block
MAX_THREADS_PER_BLOCK = 1024


@dataclass(frozen=True)
class Rate:
    """A ceiling and where it comes from: "measured", "datasheet" or "assumed"."""

    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    """One GPU: limits in bytes and counts, rates per second, pipes in lanes per cycle and SM.

    Args:
        capability: what Triton's compiler takes: 90 compiles for sm_90a.
        tensor_instructions: the SASS mnemonics of products at the chip's full rate.
        tensor: 16-bit products; 8-bit ones are twice as fast, tf32 half.
        l2: all that the programs ask for: the cache's own rate where every request reaches it, else the SMs' ports.
    """

    name: str
    capability: int
    tensor_instructions: tuple[str, ...]
    sms: int
    shared_per_block: int
    shared_per_sm: int
    clock: Rate
    tensor: Rate
    dram: Rate
    l2: Rate
    fp32_lanes: int
    alu_lanes: int = 64
    mufu_lanes: int = 16
    shared_lanes: int = 32
    warps_per_sm: int = 64
    blocks_per_sm: int = 32


CHIPS = {
    "sm_80": Chip(
        name="A100 SXM 80 GB",
        capability=80,
        tensor_instructions=("HMMA", "IMMA"),
        sms=108,
        shared_per_block=166_912,
        shared_per_sm=167_936,
        clock=Rate(1.41e9, "datasheet"),
        tensor=Rate(312e12, "datasheet"),
        dram=Rate(2.04e12, "datasheet"),
        l2=Rate(7.2e12, "datasheet"),  # 5120 bytes per cycle
        fp32_lanes=64,
    ),
    # 8.6 has the same shared memory, and 16 blocks an SM.
    "sm_89": Chip(
        name="L40S",
        capability=89,
        tensor_instructions=("HMMA", "IMMA"),
        sms=142,
        shared_per_block=101_376,
        shared_per_sm=102_400,
        clock=Rate(2.52e9, "datasheet"),
        tensor=Rate(362e12, "datasheet"),
        dram=Rate(0.864e12, "datasheet"),
        l2=Rate(142 * 64 * 2.52e9, "assumed"),
        fp32_lanes=128,
        warps_per_sm=48,
        blocks_per_sm=24,
    ),
    "sm_90": Chip(
        name="H100 SXM",
        capability=90,
        tensor_instructions=("HGMMA", "IGMMA", "QGMMA"),
        sms=132,
        shared_per_block=232_448,
        shared_per_sm=233_472,
        clock=Rate(1.98e9, "datasheet"),
        tensor=Rate(798e12, "measured"),
        dram=Rate(3.0e12, "measured"),
        l2=Rate(132 * 64 * 1.98e9, "assumed"),  # 64 bytes per cycle into each SM
        fp32_lanes=128,
    ),
    "sm_100": Chip(
        name="B200",
        capability=100,
        tensor_instructions=("UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA"),
        sms=148,
        shared_per_block=232_448,
        shared_per_sm=233_472,
        clock=Rate(1.965e9, "assumed"),
        tensor=Rate(2250e12, "datasheet"),
        dram=Rate(8.0e12, "datasheet"),
        l2=Rate(148 * 64 * 1.965e9, "assumed"),
        fp32_lanes=128,
    ),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks that fit on one SM, and what keeps out the next: "registers", "shared memory", "warps" or "blocks"."""

    blocks: int
    warps: int
    limiter: str


def occupancy(chip: Chip, registers: int, shared: int, threads: int) -> Occupancy:
    """CUDA's rules: registers by the warp and sub-partition, shared memory by the block with the system's share.

    Args:
        registers: per thread. shared: static and dynamic bytes of a block, without the system's share.
    """
    warps = -(-threads // WARP)
    per_warp = _round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    fitting_warps = REGISTERS_PER_SM // SUB_PARTITIONS // per_warp * SUB_PARTITIONS
    whole_block = per_warp * _round_up(warps, SUB_PARTITIONS)  # what a launch asks the register file for
    limits = {
        "registers": fitting_warps // warps if whole_block <= REGISTERS_PER_SM else 0,
        "shared memory": _blocks_by_shared(chip, shared),
        "warps": chip.warps_per_sm // warps if threads <= MAX_THREADS_PER_BLOCK else 0,
        "blocks": chip.blocks_per_sm,
    }
    limiter = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limiter], limits[limiter] * warps, limiter)


def _blocks_by_shared(chip: Chip, shared: int) -> int:
    if shared > chip.shared_per_block:
        return 0
    return chip.shared_per_sm // _round_up(shared + SHARED_RESERVED, SHARED_UNIT)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
