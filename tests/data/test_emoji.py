"""The emoji data: what is in it, who drew it, how it is split, and that it loads."""

import hashlib
import pickle
import re
from collections import defaultdict
from importlib.resources import files

import numpy as np
import pytest
from torch.utils.data import DataLoader

from limber_fast.data import emoji
from limber_fast.data.emoji.table import atlas, table

FOLDER = files("limber_fast.data.emoji")
# Pictures of base concepts; the tool prints the few drawings it leaves out.
COUNTS = {"twemoji": 1940, "noto": 1678, "noto-v1": 1248, "emojione": 1387, "fxemoji": 885, "fluent-emoji-flat": 1595}
LICENCES = {
    "twemoji": "CC-BY-4.0", "noto": "Apache-2.0", "noto-v1": "Apache-2.0", "emojione": "CC-BY-4.0",
    "fxemoji": "CC-BY-4.0", "fluent-emoji-flat": "MIT",
}  # fmt: skip
CONCEPTS = emoji.concepts()
BY_NAME = {concept.name: concept for concept in CONCEPTS}
DIGESTS = {
    "twemoji": "95a7524f3141", "noto": "d687a94f7a94", "noto-v1": "01da339cca13", "emojione": "222b2599b21f",
    "fxemoji": "ee5019833d31", "fluent-emoji-flat": "cf986c9bfdd5",
}  # fmt: skip


def picture(style: str, name: str) -> np.ndarray:
    images, concept = atlas(style)
    return images[np.searchsorted(concept, BY_NAME[name].index)].astype(int)


# What ships


@pytest.mark.parametrize("style", emoji.STYLES)
def test_counts_and_cells(style):
    images, concept = atlas(style)
    entry = next(entry for entry in table()["styles"] if entry["name"] == style)
    assert len(images) == len(concept) == entry["count"] == COUNTS[style]
    assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
    assert np.all(np.diff(concept) > 0) and concept[-1] < len(CONCEPTS)


@pytest.mark.parametrize("style", emoji.STYLES)
def test_licence_and_attribution_ship(style):
    entry = next(entry for entry in table()["styles"] if entry["name"] == style)
    assert entry["licence"] == LICENCES[style]
    text = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| {style} |"))
    assert entry["attribution"] in row and entry["package"] in row and str(entry["count"]) in row
    licence = FOLDER / re.search(r"\((licenses/[^)]+)\)", row).group(1)
    assert len(licence.read_text(encoding="utf-8")) > 1000
    assert sum(line.startswith(f"{style}: ") and entry["licence"] in line for line in emoji.credits()) == 1


def test_licences_are_the_texts_they_claim():
    starts = {
        "CC-BY-4.0.txt": "Attribution 4.0 International",
        "Apache-2.0.txt": "Version 2.0, January 2004",
        "MIT-fluent-emoji.txt": "Copyright (c) Microsoft Corporation",
        "MIT-emojibase.txt": "Copyright (c) 2017-2019 Miles Johnson",
        "MIT-emojilib.txt": "Copyright (c) 2014 Mu-An Chiou",
        "Unicode-3.0.txt": "UNICODE LICENSE V3",
    }
    assert {path.name for path in (FOLDER / "licenses").iterdir()} == set(starts)
    for name, phrase in starts.items():
        assert phrase in (FOLDER / "licenses" / name).read_text(encoding="utf-8")[:300]


def test_only_the_six_styles_ship():
    assert {path.name for path in FOLDER.iterdir() if path.name.endswith(".png")} == {f"{s}.png" for s in emoji.STYLES}
    assert sum((FOLDER / f"{style}.png").stat().st_size for style in emoji.STYLES) < 5e6


# Concepts


def test_concepts_are_a_table_with_unique_keys():
    assert [concept.index for concept in CONCEPTS] == list(range(len(CONCEPTS))) and len(CONCEPTS) == 1949
    for key in ("slug", "emoji", "name"):
        assert len({getattr(concept, key) for concept in CONCEPTS}) == len(CONCEPTS), key
    assert {concept.gender for concept in CONCEPTS} == {"", "female", "male"}
    assert {concept.skin_tones for concept in CONCEPTS} == {0, 1, 2}
    assert all(concept.group and concept.subgroup and concept.names[0] == concept.name for concept in CONCEPTS)
    assert sum(len(concept.names) >= 2 for concept in CONCEPTS) > 1200


def test_a_concept_reads_as_expected():
    chef = BY_NAME["woman cook"]
    assert (chef.emoji, chef.group, chef.subgroup, chef.gender, chef.skin_tones) == (
        "\U0001f469\u200d\U0001f373", "people-body", "person-role", "female", 1,
    )  # fmt: skip
    assert chef.family == BY_NAME["cook"].slug and "hot dog" in BY_NAME and "hotdog" not in BY_NAME["hot dog"].names
    assert "bangbang" in BY_NAME["double exclamation mark"].names


def test_reference_names_are_distinct_words():
    for concept in CONCEPTS:
        squeezed = [re.sub(r"[\s_-]", "", name.lower()) for name in concept.names]
        assert len(set(squeezed)) == len(squeezed), concept
        assert not any("_" in name for name in concept.names[1:]), concept


# Split


def test_no_family_straddles_a_split():
    splits = defaultdict(set)
    for concept in CONCEPTS:
        splits[concept.family].add(concept.split)
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "validation", "test"}


@pytest.mark.parametrize(
    "siblings",
    [
        ("astronaut", "man astronaut", "woman astronaut"),
        ("person running", "woman running", "man running: facing right"),
        ("person", "man", "woman: red hair", "person: bald", "man: beard", "woman: blond hair"),
        ("merperson", "mermaid", "merman"),
        ("prince", "princess", "person with crown"),
        ("Santa Claus", "Mx Claus"),
        ("kiss", "kiss: man, man"),
        ("people holding hands", "women holding hands"),
        ("backhand index pointing left", "backhand index pointing right", "backhand index pointing up"),
        ("leftwards hand", "rightwards hand"),
        ("magnifying glass tilted left", "magnifying glass tilted right"),
        ("up arrow", "down-left arrow", "left-right arrow"),
        ("one o’clock", "six-thirty"),  # noqa: RUF001
        ("keycap: 1", "keycap: #"),
        ("red heart", "blue heart", "light blue heart"),
        ("red circle", "white circle"),
        ("new moon", "full moon"),
        ("red apple", "green apple"),
        ("cat", "black cat"),
        ("flag: France", "flag: Clipperton Island"),
    ],
)
def test_siblings_are_one_family(siblings):
    assert len({BY_NAME[name].family for name in siblings}) == 1


@pytest.mark.parametrize("pair", [("cat", "dog"), ("cook", "judge"), ("flag: France", "flag: Italy"), ("fox", "wolf")])
def test_strangers_are_not(pair):
    assert BY_NAME[pair[0]].family != BY_NAME[pair[1]].family


def test_what_one_vendor_draws_alike_is_one_family():
    for style in emoji.STYLES:
        images, concept = atlas(style)
        alike = defaultdict(set)
        for image, index in zip(images, concept, strict=True):
            alike[hashlib.sha256(image.tobytes()).digest()].add(CONCEPTS[index].family)
        assert all(len(found) == 1 for found in alike.values()), style


def test_a_tenth_of_the_test_concepts_is_unseen():
    seen = emoji.EmojiDataset(emoji.TEST_STYLE)
    unseen = emoji.EmojiDataset(emoji.TEST_STYLE, concepts="unseen")
    everything = emoji.EmojiDataset(emoji.TEST_STYLE, concepts="all")
    assert (len(seen), len(unseen), len(everything)) == (1435, 160, 1595)
    assert all(CONCEPTS[i].held_out for i in unseen.concept) and not any(CONCEPTS[i].held_out for i in seen.concept)


def test_training_sees_all_seen_concepts_and_no_family_of_the_unseen():
    train = emoji.EmojiDataset()
    seen = emoji.EmojiDataset(emoji.TEST_STYLE)
    unseen = emoji.EmojiDataset(emoji.TEST_STYLE, concepts="unseen")
    assert set(seen.concept) <= set(train.concept)
    families = [{CONCEPTS[i].family for i in data.concept} for data in (train, unseen)]
    assert not families[0] & families[1]


def test_folds_are_the_split_in_small():
    train = emoji.EmojiDataset(fold="train")
    seen, unseen = (emoji.EmojiDataset(concepts=which, fold="validation") for which in ("seen", "unseen"))
    assert train.styles == tuple(style for style in emoji.TRAIN_STYLES if style != emoji.VALIDATION_STYLE)
    assert seen.styles == unseen.styles == (emoji.VALIDATION_STYLE,)
    assert set(seen.concept) <= set(train.concept)
    families = [{CONCEPTS[i].family for i in data.concept} for data in (train, unseen)]
    assert not families[0] & families[1]
    held_out = {concept.index for concept in CONCEPTS if concept.held_out}
    for fold in emoji.FOLDS:
        assert not held_out & set(emoji.EmojiDataset(concepts="all", fold=fold).concept)
    assert 90 <= len(unseen) <= 110 and len(seen) + len(unseen) == len(
        emoji.EmojiDataset(concepts="all", fold="validation")
    )


def test_constants_agree_with_the_table():
    assert tuple(style["name"] for style in table()["styles"]) == emoji.STYLES
    assert (table()["test_style"], table()["validation_style"]) == (emoji.TEST_STYLE, emoji.VALIDATION_STYLE)


# Pictures


@pytest.mark.parametrize("style", emoji.STYLES)
def test_pictures_are_pictures(style):
    images, _ = atlas(style)
    ink = (images != 255).any(-1).mean((1, 2))
    assert ink.min() > 0.005 and ink.max() <= 1 and 0.3 < ink.mean() < 0.8
    assert images.reshape(len(images), -1).std(1).min() > 2  # the white small square
    assert len({image.tobytes() for image in images}) > 0.93 * len(images)


@pytest.mark.parametrize("style", emoji.STYLES)
def test_colours_are_where_they_belong(style):
    """Red, green and blue in that order: a swapped channel or a shifted cell fails."""
    red, green, blue = picture(style, "red heart")[14, 16]
    assert red > 180 and green < 120 and blue < 150
    red, green, blue = picture(style, "four leaf clover")[10:22, 10:22].reshape(-1, 3).mean(0)
    assert green > red and green > blue
    assert picture(style, "fire")[:2, :2].min() >= 250
    face = picture(style, "neutral face")[8, 16]
    assert face[0] > 200 and face[1] > 140 and face[2] < 150


def test_every_pixel():
    """Digests of the decoded atlases: no change of renderer, rounding or cell order goes unnoticed."""
    digests = {style: hashlib.sha256(atlas(style)[0].tobytes()).hexdigest()[:12] for style in emoji.STYLES}
    assert digests == DIGESTS


def test_mirrored_alias_is_mirrored():
    left, right = (picture("fluent-emoji-flat", f"backhand index pointing {side}") for side in ("left", "right"))
    assert np.abs(left[:, ::-1] - right).max() <= 12 and np.abs(left - right).max() > 100


# Dataset


def test_items_are_pil_images_with_their_concept():
    data = emoji.EmojiDataset(["noto", "twemoji"])
    image, index = data[len(data) - 1]
    assert image.size == (32, 32) and image.mode == "RGB" and type(index) is int
    assert np.array_equal(np.asarray(image), data.images[-1]) and index == data.concept[-1]
    assert set(data.style) == {emoji.STYLES.index("noto"), emoji.STYLES.index("twemoji")}
    assert emoji.STYLES[data.style[0]] == "noto" and len(data.images) == len(data.concept) == len(data.style) == len(
        data
    )
    with pytest.raises(IndexError):
        data[len(data)]


def test_arrays_are_read_only():
    data = emoji.EmojiDataset("fxemoji")
    for array in (data.images, data.concept, data.style):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def brightness(image):
    return np.asarray(image, np.float32).mean()


def test_transform_gets_the_picture():
    data = emoji.EmojiDataset("fxemoji", transform=brightness)
    assert data[3][0] == pytest.approx(data.images[3].mean(), rel=1e-5)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_with_two_workers(method):
    data = emoji.EmojiDataset("fxemoji", concepts="unseen", transform=brightness)
    loader = DataLoader(data, batch_size=16, num_workers=2, multiprocessing_context=method)
    batches = list(loader)
    assert [int(i) for _, index in batches for i in index] == data.concept.tolist()
    expected = [image.mean() for image in data.images]
    assert np.allclose([float(v) for values, _ in batches for v in values], expected, rtol=1e-4)


def test_pickle_carries_no_pixels():
    data = emoji.EmojiDataset()
    assert len(data.images) > 6000
    packed = pickle.dumps(data)
    assert len(packed) < 1000 and np.array_equal(pickle.loads(packed).concept, data.concept)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"styles": "openmoji"}, "twemoji, noto, noto-v1, emojione, fxemoji, fluent-emoji-flat; got ['openmoji']"),
        ({"styles": []}, "got []"),
        ({"styles": ["noto", "noto"]}, "distinct"),
        ({"concepts": "new"}, "seen, unseen, all; got 'new'"),
        ({"fold": "test"}, "None or one of train, validation; got 'test'"),
        ({"styles": emoji.TEST_STYLE, "fold": "train"}, "twemoji, noto, noto-v1, fxemoji with fold='train'"),
        ({"styles": "noto", "fold": "validation"}, "emojione with fold='validation'"),
    ],
)
def test_errors_list_the_choices(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        emoji.EmojiDataset(**arguments)
