"""The modelled report: what it counts, what it says about itself, and its exit code. Nothing here is a time."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from gpu import samples
from limber_fast import cli
from limber_fast.kernels import catalogue, info_nce_cases
from limber_fast.kernels.catalogue import Work
from limber_fast.report import bounds, modelled
from limber_fast.report.aot import compile_case, sass
from limber_fast.report.aot.chips import CHIPS

CHIP = CHIPS["sm_90"]
# 8 rounds of one program per SM.
TILES = 8 * CHIP.sms
PRODUCT = Work("K=4096", 2.0 * 128 * 128 * 4096 * TILES, 1e6, 2e6, TILES, 64)
SUM = samples.sum_case()
STREAM = Work("n=1e9", 0.0, 4e9, 4e9, TILES, 1, "fp32")


@pytest.fixture
def listed(monkeypatch):
    """Sets what the catalogue holds."""

    def put(*entries):
        monkeypatch.setattr(catalogue, "cases", lambda target: {"samples": list(entries)})
        monkeypatch.setattr(catalogue, "steps", lambda target: {})

    return put


def test_product_is_limited_by_the_tensor_cores():
    found = bounds.bound(compile_case(samples.matmul(), "sm_90"), PRODUCT, CHIP)
    assert found.limiter == "tensor"
    assert found.floor == pytest.approx(PRODUCT.flops / CHIP.tensor.value)
    assert list(found.seconds.values()) == sorted(found.seconds.values(), reverse=True)
    assert found.seconds["DRAM"] == 1e6 / CHIP.dram.value and found.seconds["L2"] == 2e6 / CHIP.l2.value


def test_stream_is_limited_by_memory():
    found = bounds.bound(compile_case(SUM, "sm_90"), STREAM, CHIP)
    assert (found.limiter, found.floor) == ("DRAM", 4e9 / CHIP.dram.value)


def test_a_last_round_that_is_not_full_costs_a_round():
    build = compile_case(samples.matmul(), "sm_90")
    one_more = dataclasses.replace(PRODUCT, flops=PRODUCT.flops / TILES * (TILES + 1), programs=TILES + 1)
    assert bounds.bound(build, one_more, CHIP).floor == pytest.approx(PRODUCT.flops / CHIP.tensor.value * 9 / 8)


@pytest.mark.parametrize(("dtype", "factor"), [("fp16", 1), ("tf32", 2), ("int8", 0.5)])
def test_tensor_rate_depends_on_the_type(dtype, factor):
    build = compile_case(samples.matmul(), "sm_90")
    found = bounds.bound(build, dataclasses.replace(PRODUCT, dtype=dtype), CHIP)
    assert found.seconds["tensor"] == pytest.approx(factor * PRODUCT.flops / CHIP.tensor.value)


def test_fp32_products_run_on_the_multiply_add_pipe():
    found = bounds.bound(compile_case(samples.matmul(), "sm_90"), dataclasses.replace(PRODUCT, dtype="fp32"), CHIP)
    assert "tensor" not in found.seconds and found.limiter == "FP32"
    assert found.floor == pytest.approx(PRODUCT.flops / (256 * CHIP.sms * CHIP.clock.value))


def test_trips_follow_from_the_products_in_the_loop():
    """Not from `loop_trips`: twice the depth is twice the work, whatever the case says."""
    build = compile_case(samples.matmul(), "sm_90")
    deeper = dataclasses.replace(PRODUCT, flops=2 * PRODUCT.flops)
    wrong = dataclasses.replace(PRODUCT, loop_trips=1)
    issue = [bounds.bound(build, work, CHIP).seconds["issue"] for work in (PRODUCT, deeper, wrong)]
    assert 1.8 < issue[1] / issue[0] < 2 and issue[2] == issue[0]


def test_limiter_that_is_only_assumed_says_so():
    build = compile_case(samples.matmul(), "sm_90")
    entry = modelled.Entry("samples", 0, samples.matmul(), dataclasses.replace(PRODUCT, l2_bytes=1e12))
    row = modelled.row(entry, build, CHIP)
    assert (row["limiter"], row["limiter_source"]) == ("L2", "assumed")


def test_serial_share_counts_what_surrounds_the_products():
    """Twice the depth halves the weight of the same epilogue; no products, no share."""
    build = compile_case(samples.matmul(), "sm_90")
    deeper = dataclasses.replace(PRODUCT, flops=2 * PRODUCT.flops)
    found = [bounds.bound(build, work, CHIP) for work in (PRODUCT, deeper)]
    lost = [1 / one.serial - 1 for one in found]
    assert 0 < found[0].serial < found[1].serial < 1 and lost[0] == pytest.approx(2 * lost[1])
    assert bounds.bound(compile_case(SUM, "sm_90"), STREAM, CHIP).serial == 0


def test_a_pass_adds_up_its_launches(listed, monkeypatch, tmp_path, capsys):
    listed()
    passes = {"pass N=1": [(samples.matmul("product"), PRODUCT)] * 3 + [(SUM, STREAM)]}
    monkeypatch.setattr(catalogue, "steps", lambda target: passes)
    assert cli.main(["bench", "--modelled", "sm_90", "-k", "N=1", "--output", str(tmp_path)]) == 0
    assert "pass N=1: modelled lower bound, no GPU run" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "modelled-sm_90.json").read_text())["steps"]
    product, total, both = found["rows"]
    floor = PRODUCT.flops / CHIP.tensor.value
    assert product["launches"] == 3 and product["floor_s"] == pytest.approx(3 * floor)
    assert product["overlapped"] == pytest.approx(1) and 0 < product["serial"] < 1
    assert total["floor_s"] == pytest.approx(4e9 / CHIP.dram.value) and total["products_s"] == 0
    assert both["floor_s"] == pytest.approx(product["floor_s"] + total["floor_s"])
    assert both["overlapped"] == pytest.approx(product["products_s"] / both["floor_s"])


def test_wide_accesses_to_shared_memory_take_their_words():
    def words(name: str) -> int:
        return bounds._words(sass.Instruction(0, False, name, ""))

    names = {
        "LDS": 1,
        "LDS.U.64": 2,
        "LDS.128": 4,
        "LDSM.16.M88.4": 4,
        "LDSM.16.MT88.2": 2,
        "STS.128": 4,
        "FADD.128": 1,
    }
    assert {name: words(name) for name in names} == names


def test_report_names_its_sources_and_measures_nothing(listed, tmp_path, capsys):
    listed((samples.matmul("product"), PRODUCT), (SUM, STREAM))
    assert cli.main(["bench", "--modelled", "sm_90", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "modelled lower bound, no GPU run" in shown.out and "(measured)" in shown.out and "(assumed)" in shown.out
    assert shown.err == ""
    result = json.loads((tmp_path / "modelled-sm_90.json").read_text())
    assert result["label"] == modelled.LABEL and result["failures"] == []
    assert {result["ceilings"][name]["source"] for name in ("tensor", "dram")} == {"measured"}
    product, total = result["rows"]
    assert (product["case"], product["limiter"], total["limiter"]) == ("product", "tensor", "DRAM")
    assert product["limiter_source"] == "measured" and "  tensor (measured)  " in shown.out
    assert product["blocks_per_sm"] >= 1 and product["warps_per_sm"] == 8 * product["blocks_per_sm"]
    assert math.isclose(product["modelled_floor_s"], product["modelled_s_by_resource"]["tensor"])


def test_part_of_a_name_selects(listed, tmp_path, capsys):
    listed((samples.matmul("product"), PRODUCT), (SUM, STREAM))
    assert cli.main(["bench", "--modelled", "sm_90", "-k", "sum", "--output", str(tmp_path)]) == 0
    assert [row["case"] for row in json.loads((tmp_path / "modelled-sm_90.json").read_text())["rows"]] == [SUM.name]
    capsys.readouterr()
    assert cli.main(["bench", "--modelled", "sm_90", "-k", "nothing", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "limber-fast: no kernel with 'nothing' in its name\n"


def test_bad_build_fails_the_report(listed, tmp_path, capsys):
    listed((samples.narrow(), PRODUCT))
    assert cli.main(["bench", "--modelled", "sm_90", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("limber-fast: narrow on sm_90: 32-bit offset")


def test_amd_is_listed_without_bounds(listed, tmp_path, capsys):
    listed((samples.matmul("product"), PRODUCT))
    assert cli.main(["bench", "--modelled", "gfx942", "--output", str(tmp_path)]) == 0
    assert "gfx942: compiled for information, no bounds" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "modelled-gfx942.json").read_text())["rows"]
    assert "modelled_floor_s" not in row and any(name.startswith("v_mfma") for name in row["tensor_core"])


@pytest.mark.parametrize(
    ("capability", "target"),
    [(None, "sm_90"), ((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 3), "sm_100"),
     ((12, 0), "sm_90")],
)  # fmt: skip
def test_the_chip_of_the_device_is_priced(capability, target, listed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    listed()
    assert cli.main(["bench", "--modelled", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"limber-fast: no kernel for {target}\n"


def test_comparing_what_is_not_measured_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--modelled", "--compare", "old.json"])
    assert "--modelled measures nothing" in capsys.readouterr().err


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tensor_cores_limit_info_nce(target):
    """Every launch of a pass at D >= 512 that multiplies; on sm_100 the way from L2 into a multiprocessor does."""
    found = {
        (name, case.name): bounds.bound(compile_case(case, target), work, CHIPS[target]).limiter
        for name, launches in info_nce_cases.steps(target).items()
        for case, work in launches
        if work.flops
    }
    assert len({kernel for _, kernel in found}) == 3 and set(found.values()) == {"tensor"}
