"""What is said of the concepts: search keywords of two sources, names and keywords in other languages."""

from collections import Counter
from importlib.resources import files

from limber_fast.data import emoji

CONCEPTS = emoji.concepts()
BY_NAME = {concept.name: concept for concept in CONCEPTS}
LANGUAGES = {"de", "es", "fr", "hu", "it", "nl", "pt"}


def test_tags_are_plain_words_of_both_sources():
    for concept in CONCEPTS:
        assert len(set(concept.tags)) == len(concept.tags), concept
        assert not any("_" in tag for tag in concept.tags), concept
    octopus = BY_NAME["octopus"].tags
    assert octopus.index("animal") < octopus.index("ocean") and ":D" not in BY_NAME["grinning face"].tags
    assert "beach" in octopus and "octopus" not in octopus[1:]


def test_translations_are_a_name_and_keywords():
    counts = Counter(language for concept in CONCEPTS for language in concept.translations)
    assert set(counts) == LANGUAGES and min(counts.values()) > 1900
    for concept in CONCEPTS:
        assert all(texts and all(text.strip() for text in texts) for texts in concept.translations.values()), concept
    octopus = BY_NAME["octopus"].translations
    assert {language: octopus[language][0].lower() for language in ("de", "es", "nl", "pt")} == {
        "de": "oktopus", "es": "pulpo", "nl": "octopus", "pt": "polvo",
    }  # fmt: skip
    assert sum(len(texts) for concept in CONCEPTS for texts in concept.translations.values()) > 60_000


def test_attribution_names_every_source_of_words():
    text = (files("limber_fast.data.emoji") / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for source in ("`emojibase-data` 17.0.0", "`emojilib` 4.0.3", "MIT-emojilib.txt", "Unicode-3.0.txt"):
        assert source in text
