"""Emojibase records -> concepts, and every vendor's slugs -> those concepts."""

import json
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from emoji_packages import KEYWORDS, LANGUAGES, RECORDS, IconSet, Package

PRESETS = ("cldr", "emojibase", "emojibase-legacy", "github", "iamcal", "joypixels")
TONE = re.compile(r"(^|-)(light|medium|dark)(-|$)|skin-tone")
MALE = {"man", "men", "boy", "prince", "merman", "santa", "male"}
FEMALE = {"woman", "women", "girl", "princess", "mermaid", "mrs.", "female"}


def bare(hexcode: str) -> str:
    """Hexcode without the presentation selectors, in which the vendors disagree."""
    return "-".join(part for part in hexcode.upper().split("-") if part not in ("FE0E", "FE0F"))


def _plain(emoji: str) -> str:
    """An emoji without the presentation selector, which not every source writes."""
    return emoji.replace("\N{VARIATION SELECTOR-16}", "")


def slugify(text: str) -> str:
    text = unicodedata.normalize("NFKD", text.replace("&", " and ")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", text.replace("'", "")).strip("-")


def squeeze(text: str) -> str:
    return slugify(text).replace("-", "")


def gender(record: dict) -> str:
    """Emojibase's own mark where it has one, else the gendered words of a people label; "" when neither or both."""
    if "gender" in record:
        return ("female", "male")[record["gender"]]
    if record.get("group") != 1:
        return ""
    words = set(re.split(r"[\s:,]+", record["label"].lower()))
    found = [name for name, group in (("female", FEMALE), ("male", MALE)) if words & group]
    return found[0] if len(found) == 1 else ""


def reference_names(label: str, hexcode: str, presets: list[dict]) -> list[str]:
    """Shortcodes as words, without those that repeat the label or each other in other spacing."""
    shortcodes = []
    for preset in presets:
        found = preset.get(hexcode, ())
        shortcodes += [found] if isinstance(found, str) else found
    words = [re.sub(r"[\s_-]+", " ", code).strip() for code in shortcodes]
    names, taken = [], {squeeze(label)}
    # The version with most spaces first: "hot dog", not "hotdog"; two letters are country codes, not names.
    for name in sorted(dict.fromkeys(words), key=lambda name: -name.count(" ")):
        if squeeze(name) not in taken and len(squeeze(name)) > 2:
            taken.add(squeeze(name))
            names.append(name)
    return sorted(names, key=words.index)


def all_tags(record: dict, keywords: list[str]) -> list[str]:
    """CLDR's tags, then the keywords that it lacks; emojilib repeats the name and has emoticons among its keywords."""
    words = [word.replace("_", " ") for word in keywords]
    found = [word for word in words if re.fullmatch(r"[a-z0-9][a-z0-9 '-]+", word) and word != record["label"].lower()]
    return list(dict.fromkeys([*record.get("tags", []), *found]))


def load_concepts(folder: Path) -> list[dict]:
    """One dict per base emoji (no skin tones), in CLDR order; position is the concept's index."""
    package = Package(*RECORDS, folder)
    names = package.json("meta/groups.json")
    presets = [package.json(f"en/shortcodes/{preset}.json") for preset in PRESETS]
    words_of = Package(*KEYWORDS, folder).json("dist/emoji-en-US.json")
    keywords = {_plain(emoji): words for emoji, words in words_of.items()}
    translated = [{r["hexcode"]: r for r in package.json(f"{language}/data.json")} for language in LANGUAGES]
    concepts = []
    for record in package.json("en/data.json"):
        label, tones = record["label"], [skin["tone"] for skin in record.get("skins", ())]
        group, subgroup = record.get("group"), record.get("subgroup")
        concepts.append({
            "slug": slugify(label.replace("#", "hash").replace("*", "asterisk")),
            "emoji": record["emoji"],
            "name": label,
            "tags": all_tags(record, keywords.get(_plain(record["emoji"]), [])),
            "names": reference_names(label, record["hexcode"], presets),
            # The 26 regional indicators carry no group in emojibase; in Unicode's data they are components.
            "group": "component" if group is None else names["groups"][str(group)],
            "subgroup": "regional-indicator" if subgroup is None else names["subgroups"][str(subgroup)],
            "gender": gender(record),
            "skin_tones": 2 if any(isinstance(tone, list) for tone in tones) else int(bool(tones)),
            "hexcode": bare(record["hexcode"]),
            "tone_hexcodes": {bare(skin["hexcode"]) for skin in record.get("skins", ())},
            "order": record.get("order", 10**6),
            "translations": [
                [found["label"], *found.get("tags", [])] if (found := records.get(record["hexcode"])) else []
                for records in translated
            ],
        })  # fmt: skip
    concepts.sort(key=lambda concept: (concept["order"], concept["hexcode"]))
    if len({concept["slug"] for concept in concepts}) != len(concepts):
        raise ValueError("two emojibase records give the same slug")
    return concepts


class Matcher:
    """Finds the concept that a vendor's slug draws: by code point where the package has them, else by name."""

    def __init__(self, concepts: list[dict], folder: Path):
        package = Package(*RECORDS, folder)
        self.by_hexcode = {concept["hexcode"]: i for i, concept in enumerate(concepts)}
        self.by_slug = {concept["slug"]: i for i, concept in enumerate(concepts)}
        self.by_label = {concept["name"]: i for i, concept in enumerate(concepts)}
        self.toned = set().union(*(concept["tone_hexcodes"] for concept in concepts))
        self.by_words = self._unique((squeeze(concept["name"]), i) for i, concept in enumerate(concepts))
        unicode_names = package.json("meta/unicode-names.json").items()
        self.by_unicode = self._unique(
            (squeeze(name), index)
            for code, name in unicode_names
            if (index := self.by_hexcode.get(bare(code))) is not None
        )
        self.by_shortcode = self._unique((squeeze(n), i) for i, found in enumerate(concepts) for n in found["names"])
        self.by_hand = json.loads((Path(__file__).parent / "emoji_slugs.json").read_text(encoding="utf-8"))

    @staticmethod
    def _unique(pairs) -> dict[str, int]:
        found = defaultdict(set)
        for key, index in pairs:
            found[key].add(index)
        return {key: next(iter(indices)) for key, indices in found.items() if len(indices) == 1}

    def by_name(self, slug: str) -> int | None:
        """Looser than the label itself: older flag and letter slugs, then the same words, then other standard names."""
        older = re.sub(r"^letter-(?=.$)", "regional-indicator-", re.sub(r"^flag-for-(flag-)?", "flag-", slug))
        for table, key in ((self.by_slug, older), (self.by_words, squeeze(slug)), (self.by_unicode, squeeze(slug)),
                           (self.by_shortcode, squeeze(slug))):  # fmt: skip
            if key in table:
                return table[key]
        return None

    def match(self, icons: IconSet) -> tuple[dict[int, str], list[str]]:
        """({concept index: slug}, [slugs of base drawings that match no concept])."""
        matched = self._match_codes(icons) if icons.chars else self._match_names(icons)
        toned = {slug for code, slug in icons.chars.items() if bare(code) in self.toned}
        known = toned | set(matched.values())
        return matched, [slug for slug in icons.slugs if slug not in known and not TONE.search(slug)]

    def _match_codes(self, icons: IconSet) -> dict[int, str]:
        codes = ((self.by_hexcode.get(bare(code)), slug) for code, slug in icons.chars.items())
        matched = {index: slug for index, slug in codes if index is not None}
        for slug in icons.mirrored():
            if slug in self.by_slug:
                matched.setdefault(self.by_slug[slug], slug)
        return matched

    def _match_names(self, icons: IconSet) -> dict[int, str]:
        hand = {**self.by_hand["*"], **self.by_hand.get(icons.style.name, {})}
        slugs = [slug for slug in icons.slugs if not TONE.search(slug)]
        passes = (
            lambda slug: self.by_label[hand[slug]] if hand.get(slug) else None,
            self.by_slug.get,
            # Only now by looser rules: they must not take the cell of a drawing that bears the name itself.
            lambda slug: next((i for i in map(self.by_name, [slug, *icons.aliases_of(slug)]) if i is not None), None),
        )
        matched: dict[int, str] = {}
        for number, find in enumerate(passes):
            for slug in slugs:
                index = find(slug) if number == 0 or slug not in hand else None
                if index is not None and slug not in matched.values():
                    matched.setdefault(index, slug)
        return matched
