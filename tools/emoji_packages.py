"""The npm packages the emoji atlases are made from: where they lie, how an icon becomes an SVG, who drew it."""

import json
import subprocess
import tarfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

RECORDS = ("emojibase-data", "17.0.0")
KEYWORDS = ("emojilib", "4.0.3")
# Latin scripts, which the word tokenizer reads, and the seven that tell most of unseen concepts (training/SETTINGS.md).
LANGUAGES = ("de", "es", "fr", "hu", "it", "nl", "pt")


@dataclass(frozen=True)
class Style:
    """One vendor's drawings. The licence is the art's own, which is not always what the icon package says."""

    name: str
    version: str
    licence: str
    attribution: str
    source: str
    note: str = ""

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.name}"


# Order matters: it is the order of the styles in concepts.json and of `style` indices in the dataset.
STYLES = (
    Style("twemoji", "1.2.5", "CC-BY-4.0", "Copyright Twitter, Inc and other contributors", "https://github.com/jdecked/twemoji"),
    Style("noto", "1.2.9", "Apache-2.0", "Copyright Google LLC, Noto Emoji", "https://github.com/googlefonts/noto-emoji"),
    Style("noto-v1", "1.2.5", "Apache-2.0", "Copyright Google LLC, Noto Emoji (before the 2020 redesign)",
          "https://github.com/googlefonts/noto-emoji"),
    Style("emojione", "1.2.3", "CC-BY-4.0", "EmojiOne v2, provided free by JoyPixels (Ranks.com Inc.)",
          "https://github.com/joypixels/emojione-legacy"),
    Style("fxemoji", "1.2.2", "CC-BY-4.0", "Copyright Mozilla Foundation, FxEmojis", "https://github.com/mozilla/fxemoji",
          "the icon package says Apache-2.0, which covers Mozilla's code; the art is CC BY 4.0"),
    Style("fluent-emoji-flat", "1.2.6", "MIT", "Copyright (c) Microsoft Corporation, Fluent Emoji",
          "https://github.com/microsoft/fluentui-emoji"),
)  # fmt: skip


@dataclass(frozen=True)
class Package:
    """Reads one npm package from `<folder>/<name>-<version>.tgz` or the same unpacked."""

    name: str
    version: str
    folder: Path
    _cache: dict = field(default_factory=dict, compare=False)

    @cached_property
    def stem(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"

    def text(self, member: str) -> str:
        if member not in self._cache:
            unpacked, packed = self.folder / self.stem / "package" / member, self.folder / f"{self.stem}.tgz"
            if unpacked.is_file():
                self._cache[member] = unpacked.read_text(encoding="utf-8")
            elif packed.is_file():
                with tarfile.open(packed) as archive:
                    self._cache[member] = archive.extractfile(f"package/{member}").read().decode("utf-8")
            else:
                raise FileNotFoundError(
                    f"{self.name}@{self.version}: neither {unpacked} nor {packed} exists; "
                    f"run with --fetch, or `npm pack {self.name}@{self.version}` in {self.folder}"
                )
        return self._cache[member]

    def json(self, member: str):
        return json.loads(self.text(member))


def fetch(folder: Path) -> None:
    """`npm pack` every missing package, by name and pinned version."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in [*((style.package, style.version) for style in STYLES), RECORDS, KEYWORDS]:
        if not (folder / f"{Package(name, version, folder).stem}.tgz").is_file():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)


class IconSet:
    """The icons of one style: slugs, aliases, and the SVG text of each."""

    def __init__(self, style: Style, folder: Path):
        package = Package(style.package, style.version, folder)
        self.style, self.data, self.chars = style, package.json("icons.json"), package.json("chars.json")
        self.aliases: dict[str, dict] = self.data.get("aliases", {})
        # Hidden icons are drawings the vendor has withdrawn or renamed; a successor is in the set.
        self.slugs = [slug for slug, icon in self.data["icons"].items() if not icon.get("hidden")]

    def aliases_of(self, slug: str) -> list[str]:
        """Other names of exactly this drawing; a mirrored alias is a drawing of its own."""
        return [name for name, alias in self.aliases.items() if alias["parent"] == slug and len(alias) == 1]

    def mirrored(self) -> list[str]:
        return [name for name, alias in self.aliases.items() if alias.get("hFlip")]

    def svg(self, slug: str) -> str:
        flips, icon = False, None
        while icon is None:
            if slug in self.data["icons"]:
                icon = self.data["icons"][slug]
            else:
                flips ^= bool(self.aliases[slug].get("hFlip"))
                slug = self.aliases[slug]["parent"]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = (icon.get(side, self.data.get(side, 16)) for side in ("width", "height"))
        body = icon["body"]
        if flips:
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
        )
