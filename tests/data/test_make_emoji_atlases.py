"""The tool that makes the atlases. Set LIMBER_FAST_EMOJI_PACKAGES to a folder of the npm packages for the last test."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limber_fast.data import emoji
from limber_fast.data.emoji.table import atlas

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PACKAGES = os.environ.get("LIMBER_FAST_EMOJI_PACKAGES")


@pytest.fixture
def tool(monkeypatch):
    """make_emoji_atlases and its neighbours, importable only here."""
    pytest.importorskip("resvg_py", reason="resvg-py draws the SVGs; only the tool needs it")
    monkeypatch.syspath_prepend(str(TOOLS))
    import make_emoji_atlases

    return make_emoji_atlases


def svg(body: str, width: int, height: int) -> str:
    box = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{body}</svg>'


def test_render_is_area_coverage_on_white(tool):
    cell = tool.render(svg('<rect x="8" y="8" width="8.5" height="8" fill="#f00"/>', 32, 32))
    assert cell.shape == (32, 32, 3) and cell.dtype == np.uint8
    assert np.all(cell[8:16, 8:16] == (255, 0, 0)) and np.all(cell[16:] == 255) and np.all(cell[:, 17:] == 255)
    assert np.abs(cell[8:16, 16].astype(int) - (255, 128, 128)).max() <= 2


def test_render_keeps_proportions(tool):
    cell = tool.render(svg('<rect width="16" height="32" fill="#00f"/>', 16, 32))
    columns = np.flatnonzero((cell != 255).any((0, 2)))
    assert columns[0] == 8 and columns[-1] == 23 and np.all(cell[:, 8:24] == (0, 0, 255))


def test_render_keeps_six_bits(tool):
    body = "".join(f'<rect x="{x}" width="1" height="32" fill="#{x * 8:02x}0000"/>' for x in range(32))
    values = np.unique(tool.render(svg(body, 32, 32)))
    assert set(values) <= {(level * 255 + 31) // 63 for level in range(64)}


def test_png_holds_the_cells_in_order(tool):
    cells = np.random.default_rng(0).integers(0, 256, (tool.COLUMNS + 3, 32, 32, 3), dtype=np.uint8)
    data = tool.png(tool.atlas(cells))
    assert data == tool.png(tool.atlas(cells))
    sheet = np.asarray(Image.open(io.BytesIO(data)))
    assert sheet.shape == (64, 32 * tool.COLUMNS, 3)
    assert np.array_equal(sheet[:32, 32:64], cells[1]) and np.array_equal(sheet[32:, 64:96], cells[-1])
    assert np.all(sheet[32:, 96:] == 255)


def test_hold_out_depends_on_the_family_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    from emoji_families import LARGEST_HELD_OUT, hold_out

    names = [f"family {i // 2}" for i in range(400)]
    held = hold_out(names, set(range(400)), 0.1, "test")
    assert len(held) == 20 and held == hold_out(names, set(range(400)), 0.1, "test")
    assert held == hold_out(names[::-1], set(range(400)), 0.1, "test")
    assert held != hold_out(names, set(range(400)), 0.1, "validation")
    for size in range(1, 40):
        more = hold_out(names + ["clock"] * size, set(range(400 + size)), 0.1, "test")
        assert held <= more and ("clock" not in more or size <= LARGEST_HELD_OUT)


@pytest.mark.skipif(not PACKAGES, reason="LIMBER_FAST_EMOJI_PACKAGES names no folder of npm packages")
@pytest.mark.parametrize("style", emoji.STYLES)
def test_the_packages_give_the_committed_pictures(tool, style):
    folder = Path(PACKAGES)
    icons = tool.IconSet(next(entry for entry in tool.STYLES if entry.name == style), folder)
    matched, _ = tool.Matcher(tool.load_concepts(folder), folder).match(icons)
    images, concept = atlas(style)
    assert sorted(matched) == concept.tolist()
    for cell in range(0, len(concept), 97):
        assert np.array_equal(tool.render(icons.svg(matched[concept[cell]])), images[cell]), matched[concept[cell]]
