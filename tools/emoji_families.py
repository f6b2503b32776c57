"""Families: concepts whose drawings differ only in gender, direction, hair, colour and the like; the split by them."""

import hashlib
import re
from collections import defaultdict

# People of three genders, and the same people with other hair, are one person here.
ADULTS = re.compile(r"\b(1F468|1F469|1F9D1|1F471|1F9D4)\b")
DROPPED_PARTS = {"2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}  # gender signs, "facing right", hair
DIRECTIONS = {"left", "right", "up", "down", "leftwards", "rightwards", "upwards", "downwards", "facing"}
COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink"}
SIZES = {"large", "medium", "small"}
# Gendered pairs and series that neither code points nor words show: a pattern on the label, and the name of the series.
SERIES = [
    (r"^(older person|old man|old woman)$", "older person"),
    (r"^(child|boy|girl)$", "child"),
    (r"^(prince|princess|person with crown)$", "crown"),
    (r"^(Santa Claus|Mrs\. Claus|Mx Claus)$", "Claus"),
    (r"^pregnant (man|woman|person)$", "pregnant"),
    (r"^(breast-feeding|(man|woman|person) feeding baby)$", "feeding"),
    (r"^(man|woman) dancing$", "dancing"),
    (r"^(people|women|men|woman and man) holding hands$", "holding hands"),
    (r"^(wo)?men.s room$", "room"),
    (r"^kiss(: .*)?$", "kiss"),
    (r"^couple with heart", "couple with heart"),
    (r"^family(: .*)?$", "family"),
    (r"moon$", "moon"),
    (r"moon face$", "moon face"),
    (r"^globe showing", "globe"),
    (r"^speaker (low|medium|high) volume$|^muted speaker$", "speaker"),
    (r"mailbox with (raised|lowered) flag$", "mailbox"),
    (r"^sun behind (small|large|)\s?cloud$", "sun behind cloud"),
    (r"^(dim|bright) button$", "brightness"),
    (r"\(blood type\)$", "blood type"),
    (r"^hourglass (not )?done$", "hourglass"),
    (r"^\w+ place medal$", "place medal"),
    (r"^(yen|dollar|euro|pound) banknote$", "banknote"),
    (r"^(person|man|woman) (frowning|pouting)$", "frowning"),
    (r"^flag: (Indonesia|Monaco)$", "flag of two bars"),
    (r"^(see|hear|speak)-no-evil monkey$", "no-evil monkey"),
    (r"^(tear-off )?calendar$", "calendar"),
    (r"^bell( with slash)?$", "bell"),
    (r"^camera( with flash)?$", "camera"),
    (r"^airplane (arrival|departure)$", "airplane"),
    (r"^(star of David|dotted six-pointed star)$", "six-pointed star"),
    (r"^(closed|green|blue|orange) book$", "book"),
    (r"^(open )?file folder$", "file folder"),
    (r"^(in|out)box tray$", "tray"),
    (r"^(low )?battery$", "battery"),
    (r"^(un)?locked$", "lock"),
    (r"^chart (in|de)creasing", "chart"),
    (r"^umbrella( with rain drops)?$", "umbrella"),
    (r"^snowman( without snow)?$", "snowman"),
    (r"^(play|reverse) button$", "play"),
    (r"^fast(-forward| reverse) button$", "fast forward"),
    (r"^(next|last) track button$", "track"),
]
WHOLE_SUBGROUPS = {"keycap", "regional-indicator", "skin-tone", "hair-style"}
# Larger families always train: one held-out family of clocks would be a seventh of the unseen test, all one drawing.
LARGEST_HELD_OUT = 8
SALT = "limber_fast emoji families v1"


def keys(concept: dict) -> list[tuple]:
    """Every key that two siblings share."""
    label, code, subgroup = concept["name"], concept["hexcode"], concept["subgroup"]
    parts = [part for part in ADULTS.sub("ADULT", code).split("-") if part not in DROPPED_PARTS and part != "200D"]
    found = [("code", *parts)] if parts else []
    found += [("series", name) for pattern, name in SERIES if re.search(pattern, label)]
    words = [word for word in re.split(r"[\s-]+", label.lower().replace("light blue", "blue")) if word]
    for dropped in (DIRECTIONS, COLOURS | SIZES):
        rest = [word for word in words if word not in dropped]
        # Colours of people are hair, which the code point shows; "white cane" is no colour variant of "cane".
        if rest and (dropped is DIRECTIONS or concept["group"] != "people-body"):
            found.append(("words", subgroup, *rest))
    if subgroup in WHOLE_SUBGROUPS:
        found.append(("subgroup", subgroup))
    if subgroup == "arrow" and label.endswith("arrow"):
        found.append(("series", "arrow"))
    if re.fullmatch(r"1F5(5[0-9A-F]|6[0-7])", code):
        found.append(("series", "clock"))
    return found


def families(concepts: list[dict], same_drawing: list[tuple[int, int]]) -> list[int]:
    """Union-find over shared keys and over pairs that some vendor draws alike; the root is the smallest index."""
    parent = list(range(len(concepts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(i: int, j: int) -> None:
        i, j = sorted((root(i), root(j)))
        parent[j] = i

    first: dict[tuple, int] = {}
    for i, concept in enumerate(concepts):
        for key in keys(concept):
            join(i, first.setdefault(key, i))
    for pair in same_drawing:
        join(*pair)
    return [root(i) for i in range(len(concepts))]


def hold_out(family_names: list[str], counted: set[int], share: float, purpose: str) -> set[str]:
    """Families in the order of their hash until `share` of the `counted` concepts is held out.

    The order depends on nothing but the family's own name, so a concept added elsewhere leaves the choice as it is.
    """
    members = defaultdict(list)
    for index, family in enumerate(family_names):
        members[family].append(index)
    held: set[str] = set()
    total = 0
    for family in sorted(members, key=lambda name: hashlib.sha256(f"{SALT}/{purpose}/{name}".encode()).digest()):
        size = len(counted.intersection(members[family]))
        if size and len(members[family]) <= LARGEST_HELD_OUT and total < share * len(counted):
            held.add(family)
            total += size
    return held
