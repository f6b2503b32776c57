"""Single-line faults of the shipped kernels that no result can show, each with its reason: they do not count.

By a pattern of "statement -> changed statement // line of source", as `gpu.ptx.mutate.mutants` takes them.
"""

from __future__ import annotations

# In the library's fp64 exp2 and log, what no argument of this kernel's reaches. Infinity and NaN do reach them.
_NEVER_ZERO = "log of zero or of the largest numbers: its argument is 1 + ratio < 2^1000, or is discarded"
_SIZE = {
    r"setp\.lt\.s32 (.*), 1; -> setp\.(le\.s32 \1, 1|lt\.s32 \1, [02]);": "a size is at least 1; 1 is another build",
}
_BELOW_ZERO = "how a division by a power of two rounds below zero: what it divides is at least 0"
_OF_ANY_KERNEL = {r"@!?%p\d+ fence\.proxy\.tensormap.* -> @": "the other warps acquire it, ahead of the same barrier"}
_ATTENTION = {
    r"@!?%p\d+ bra .* -> @.* // .*if \(pair_of_lane == 0\) (of_warps|largest_sums)":
        "which of a row's four lanes stores what all four hold",
    r"mov\.f32 .*, 0f00000000; -> .*0f3F800000; // .*for \(int at = begin;": "sums times 0 as the first tile begins",
    r"shr\.s32 (.*), 31; -> shr\.s32 \1, 3[02];|"
    r"shr\.u32 (.*), 24; -> (shr\.u32 \2, 2[35]|shl\.b32 \2, 24); // .*int\(SPLIT\)": _BELOW_ZERO,
}
_OF = {
    "info_nce_fwd_kernel": {
        r"-?1065353216\b.* -> .*106535321[57]\b": "whether a sum is within 2^64 of 1: any up to 2^126 are exact",
        r"selp\.b32 .*, 0, .* -> .*, 1, .* // .*\bdistance\(": "2^-23 instead of 0 powers from 1, of nobody's sum",
        r"add\.s32 (.*), (32|64|128); -> add\.s32 \1, (31|33|63|65|127|129); // .*n0 < m0 \+ BLOCK_M":
            "which tiles may hold a positive: they begin at multiples of 32, and masks follow",
    },
    "info_nce_sigmoid_kernel": {
        r"setp\.lt\.f32 (.*, 0f00000000); -> setp\.le\.f32 \1;": "the slope at 0 is 1/2 from either side",
    },
    "int8_linear_grad_kernel": _SIZE,
    "int8_linear_quantize_kernel": _SIZE,
    "frozen_cross_entropy_chunk_kernel": {
        **_SIZE,
        r"@%p\d+ st\.global\.b32 .* -> @!": "a row's maximum and sums are the same in every lane of its warp",
    },
    "frozen_cross_entropy_finish_kernel": {
        **_SIZE,
        r"^mul\.f32 .*, 0f4B000000;|0fC1B80000, .* -> .*0f41B80000|^setp\.\w+\.f32 .*, 0f00800000;":
            "how log2 takes denormals: its arguments are 0, whose log2 is what it is, or at least 1",
    },
    "frozen_cross_entropy_bwd_kernel": _SIZE,
    "info_nce_finish_kernel": {
        r"add\.s32 .*, -1; -> (sub|.*, 0;)": _NEVER_ZERO,
        r"and\.b32 .*, 2147483647; -> (or|and.*, 2147483646)": _NEVER_ZERO,
        r"setp\.eq\.b32 .*, 0; -> setp\.eq": _NEVER_ZERO,
        r"shr\.s32 .*, 1; -> .*, 2;": "exp2 below 2^-1022 in two factors: any split into normal ones is exact",
        r"0f4090CC00; -> .*0fC090CC00;": "where exp2 ends, 0 instead of below 2^-1022: 0 in fp32 beside any sum",
        r"setp\.lt\.u32 .*, 1073127583; -> .*, 107312758[24];": "on which side of sqrt(2) log takes one number",
        r"mov\.b32 .*, 0; -> .*, 1; // .*mask=mask, other=0": "what lanes past the end hold, which nobody stores",
    },
    "prefix_attention_parts_kernel": _ATTENTION,
    "prefix_attention_rest_kernel": _ATTENTION,
    "read_words_kernel": {
        r"@!?%p\d+ bra .* -> @.* // if \(threadIdx\.x % 32 == 0\) warp_sums":
            "which of a warp's lanes stores what all of them hold",
    },
    "page_copy_kernel": {
        r"shr\.s64 (.*), 63; -> shr\.s64 \1, 6[24];|shr\.u64 (.*), 60; -> (shr\.u64 \2, (59|61)|shl\.b64 \2, 60);":
            _BELOW_ZERO,
    },
}


def unobservable(kernel: str) -> dict[str, str]:
    """Reasons by pattern."""
    return _OF_ANY_KERNEL | _OF.get(kernel, {})
