"""Make limber_fast/data/emoji from the npm packages: one 32 px PNG atlas per vendor, one table of concepts and
their names in other languages.

    python tools/make_emoji_atlases.py PACKAGES            # a folder of packed or unpacked npm packages
    python tools/make_emoji_atlases.py PACKAGES --fetch    # `npm pack` what is missing, by name and pinned version
    python tools/make_emoji_atlases.py PACKAGES --check    # render again and compare with what is committed

Needs resvg-py, numpy, pillow and rich. The same packages give the same bytes: icons are drawn without system fonts and
in a fixed order, and the files hold no time or machine name. (PNG bytes also depend on the zlib at hand, so --check
compares pixels.)
"""

import argparse
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import resvg_py
from emoji_concepts import Matcher, load_concepts
from emoji_families import families, hold_out
from emoji_packages import KEYWORDS, LANGUAGES, RECORDS, STYLES, IconSet, fetch
from PIL import Image
from rich.console import Console
from rich.progress import track

OUT = Path(__file__).resolve().parents[1] / "limber_fast" / "data" / "emoji"
SIZE, OVERSAMPLE, BITS, COLUMNS = 32, 4, 6, 48
TEST_STYLE, VALIDATION_STYLE = "fluent-emoji-flat", "emojione"
FIELDS = ("slug", "emoji", "name", "tags", "names", "group", "subgroup", "gender", "skin_tones", "family", "split")
LICENSE_FILES = {"CC-BY-4.0": "CC-BY-4.0.txt", "Apache-2.0": "Apache-2.0.txt", "MIT": "MIT-fluent-emoji.txt"}
ATTRIBUTION = """# Who drew and wrote the emoji data

The pictures are the work of the vendors below, taken from the icon packages named and **changed**: drawn at 32 x 32
pixels on a white ground with 6 bits per colour channel, and gathered into one sheet per vendor (`<style>.png`). No
vendor endorses this project.

| style | pictures | art | licence | from |
|---|---|---|---|---|
{rows}

{notes}

The names, tags, groups and shortcodes in `concepts.json` and the names and tags in `translations.json` come from
`{package}` {version}, Copyright (c) Miles Johnson, [MIT](licenses/MIT-emojibase.txt), whose texts are Unicode CLDR
data, Copyright Unicode, Inc., [Unicode-3.0](licenses/Unicode-3.0.txt). The tags that CLDR does not have are keywords of
`{keywords[0]}` {keywords[1]}, Copyright (c) 2014 Mu-An Chiou, [MIT](licenses/MIT-emojilib.txt). Families, splits and
the layout are this project's own.

CC BY 4.0 in full: `licenses/CC-BY-4.0.txt`, <https://creativecommons.org/licenses/by/4.0/>. A page or paper that shows
these pictures has to name the vendors: `limber_fast.data.emoji.credits()` gives the lines.
"""
console = Console(stderr=True, soft_wrap=True)


def render(svg: str) -> np.ndarray:
    """[32, 32, 3] uint8 on white: drawn at 4 x and averaged over 4 x 4 squares.

    resvg blends each shape's edge on its own, so a direct 32 px render lets the white ground shine through the seams
    between shapes that touch. The plain mean is exact area coverage, has no ringing, and is the same on every machine.
    Each channel keeps 6 bits (at most 2 of 255 off): gradients then repeat, and the atlases shrink from 5.5 to 4.2 MB.
    """
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=SIZE * OVERSAMPLE, height=SIZE * OVERSAMPLE, background="white", skip_system_fonts=True
    )
    drawn = Image.open(io.BytesIO(png)).convert("RGB")
    square = Image.new("RGB", (SIZE * OVERSAMPLE,) * 2, "white")  # an icon that is not square stays in proportion
    square.paste(drawn, tuple((SIZE * OVERSAMPLE - side) // 2 for side in drawn.size))
    tiles = np.asarray(square, np.uint32).reshape(SIZE, OVERSAMPLE, SIZE, OVERSAMPLE, 3)
    levels = 2**BITS - 1
    scale = 255 * OVERSAMPLE**2
    quantised = (tiles.sum((1, 3)) * levels + scale // 2) // scale
    return ((quantised * 255 + levels // 2) // levels).astype(np.uint8)


def atlas(cells: np.ndarray) -> np.ndarray:
    """[n, 32, 32, 3] -> one picture, row by row, `COLUMNS` to a row, the rest white."""
    rows = -(-len(cells) // COLUMNS)
    sheet = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    sheet[: len(cells)] = cells
    return sheet.reshape(rows, COLUMNS, SIZE, SIZE, 3).swapaxes(1, 2).reshape(rows * SIZE, COLUMNS * SIZE, 3)


def same_drawings(cells: np.ndarray, indices: list[int]) -> list[tuple[int, int]]:
    """Pairs of concepts whose pictures one vendor made identical, such as the flags of France and Clipperton Island."""
    seen: dict[bytes, int] = {}
    return [(index, seen.setdefault(cell.tobytes(), index)) for index, cell in zip(indices, cells, strict=True)]


def build(folder: Path, styles=STYLES) -> tuple[dict, dict[str, np.ndarray]]:
    """(the table, {style: cells [n, 32, 32, 3]})."""
    concepts = load_concepts(folder)
    matcher = Matcher(concepts, folder)
    cells: dict[str, np.ndarray] = {}
    drawn: dict[str, list[int]] = {}
    for style in styles:
        icons = IconSet(style, folder)
        matched, unmatched = matcher.match(icons)
        drawn[style.name] = sorted(matched)
        work = track(drawn[style.name], f"{style.name:18}", console=console)
        cells[style.name] = np.stack([render(icons.svg(matched[index])) for index in work])
        console.print(f"{style.name}: {len(matched)} concepts; {len(unmatched)} drawings match no concept: {unmatched}")

    pairs = [pair for name in drawn for pair in same_drawings(cells[name], drawn[name])]
    names = [concepts[root]["slug"] for root in families(concepts, pairs)]
    split = split_by_family(names, drawn)
    for concept, family in zip(concepts, names, strict=True):
        concept |= {"family": family, "split": split[family]}
    table = {
        "about": "Made by tools/make_emoji_atlases.py; see ATTRIBUTION.md.",
        "cell": SIZE,
        "columns": COLUMNS,
        "records": {"package": RECORDS[0], "version": RECORDS[1], "licence": "MIT"},
        "languages": LANGUAGES,
        "test_style": TEST_STYLE,
        "validation_style": VALIDATION_STYLE,
        "styles": [
            {"name": style.name, "package": style.package, "version": style.version, "licence": style.licence,
             "attribution": style.attribution, "source": style.source, "note": style.note,
             "count": len(drawn[style.name]), "cells": drawn[style.name]}
            for style in styles
        ],
        "concepts": [{field: concept[field] for field in FIELDS} for concept in concepts],
        "translations": [concept["translations"] for concept in concepts],
    }  # fmt: skip
    return table, cells


def split_by_family(names: list[str], drawn: dict[str, list[int]]) -> dict[str, str]:
    """{family: "test" | "validation" | "train"}: a tenth of the test vendor's concepts, then a tenth of the rest.

    Families that the test vendor does not draw (the country flags above all) train: held out, they would test nothing.
    """
    testable = set(drawn[TEST_STYLE])
    test = hold_out(names, testable, 0.1, "test")
    rest = {index for index in testable.intersection(drawn[VALIDATION_STYLE]) if names[index] not in test}
    validation = hold_out(names, rest, 0.1, "validation")
    return {name: "test" if name in test else "validation" if name in validation else "train" for name in names}


def dump(table: dict) -> str:
    """JSON with one concept, or one atlas row of cells, per line: small, and a change shows as the lines it touches."""

    def compact(value) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def style_lines(style: dict) -> str:
        rows = [style["cells"][i : i + COLUMNS] for i in range(0, len(style["cells"]), COLUMNS)]
        cells = ",\n".join(",".join(map(str, row)) for row in rows)
        return compact(style | {"cells": []}).removesuffix("]}") + f"\n{cells}\n]}}"

    def entry(key: str, value) -> str:
        lines = {"concepts": compact, "translations": compact, "styles": style_lines}.get(key)
        return compact(key) + ":" + (compact(value) if lines is None else "[\n" + ",\n".join(map(lines, value)) + "\n]")

    return "{\n" + ",\n".join(entry(*item) for item in table.items()) + "\n}\n"


def png(picture: np.ndarray) -> bytes:
    """RGB PNG without row filters, which cost 12% on flat drawings (noto); Pillow offers no way to leave them out."""
    height, width, _ = picture.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], axis=1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows.tobytes(), 9),
        b"IEND": b"",
    }
    body = (struct.pack(">I", len(c)) + tag + c + struct.pack(">I", zlib.crc32(tag + c)) for tag, c in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def attribution(table: dict) -> str:
    rows = [
        f"| {style['name']} | {style['count']} | {style['attribution']}, <{style['source']}> "
        f"| [{style['licence']}](licenses/{LICENSE_FILES[style['licence']]}) "
        f"| `{style['package']}` {style['version']} |"
        for style in table["styles"]
    ]
    notes = [f"{style['name']}: {style['note']}." for style in table["styles"] if style["note"]]
    return ATTRIBUTION.format(rows="\n".join(rows), notes=" ".join(notes), keywords=KEYWORDS, **table["records"])


def texts(table: dict) -> dict[str, str]:
    """{file name: what it holds}; `concepts()` reads the translations only when somebody asks for them."""
    shared = {key: value for key, value in table.items() if key != "translations"}
    translations = {key: table[key] for key in ("about", "languages", "translations")}
    tables = {"concepts.json": dump(shared), "translations.json": dump(translations)}
    return {**tables, "ATTRIBUTION.md": attribution(table)}


def check(table: dict, cells: dict[str, np.ndarray]) -> int:
    wrong = []
    for name, text in texts(table).items():
        if (OUT / name).read_text(encoding="utf-8") != text:
            wrong.append(name)
    for name, pictures in cells.items():
        with Image.open(OUT / f"{name}.png") as committed:
            if not np.array_equal(np.asarray(committed.convert("RGB")), atlas(pictures)):
                wrong.append(f"{name}.png")
    console.print(f"not as the packages make it: {', '.join(wrong)}" if wrong else "the files match the packages")
    return bool(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with the npm packages, packed (.tgz) or unpacked")
    parser.add_argument("--fetch", action="store_true", help="npm pack the missing packages into that folder first")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the committed files differ")
    arguments = parser.parse_args()
    if arguments.fetch:
        fetch(arguments.packages)
    try:
        table, cells = build(arguments.packages)
    except FileNotFoundError as error:
        parser.error(str(error))
    if arguments.check:
        return check(table, cells)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, pictures in cells.items():
        (OUT / f"{name}.png").write_bytes(png(atlas(pictures)))
    for name, text in texts(table).items():
        (OUT / name).write_text(text, encoding="utf-8")
    for path in sorted([*OUT.glob("*.png"), *OUT.glob("*.json")]):
        console.print(f"{path.name:24} {path.stat().st_size / 1024:8.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
