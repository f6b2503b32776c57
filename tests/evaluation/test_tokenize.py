"""ptb_tokenize against CoreNLP 3.4.1: its recorded tokens everywhere, the program itself where there is Java."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from caption_cases import captions
from hypothesis import given
from hypothesis import strategies as st

from limber_fast.evaluation.tokenize import PUNCTUATION, ptb_tokenize

# Printed by CoreNLP 3.4.1, punctuation dropped as pycocoevalcap does.
RECORDED = {
    "A man's dog isn't here, and he can't (won't) go.":
        "a man 's dog is n't here and he ca n't -lrb- wo n't -rrb- go",
    "Two half-eaten \"pizzas\" on 5:30 $3.50 50% w/ cheese...":
        "two half-eaten pizzas on 5:30 $ 3.50 50 % w / cheese",
    "gonna cannot wanna U.S. Mr. Smith vs. the St. Bernard 1990's '90s o'clock AT&T and/or":
        "gon na can not wan na u.s. mr. smith vs. the st. bernard 1990 's '90s o'clock at&t and/or",
    "rock'n'roll y'all ya'll ma'am jack-o'-lantern 'tis C'mon ol' goin'":
        "rock 'n' roll y' all ya 'll ma'am jack-o lantern 't is c'mon ol' goin",
    "should've shouldn't've I'm let's ISN'T isnt' it\u2019s": "should 've should n't 've i 'm let 's is n't isnt it 's",
    "1,000 people at 10:30am or 3pm, 2nd #1 @home -5 1,000-foot 24/7 1/2": (
        "1,000 people at 10:30 am or 3pm 2nd # 1 @home -5 1,000-foot 24/7 1/2"
    ),
    "table.The man shirt,blue cat.12 half-eaten.The a--b": "table.the man shirt blue cat .12 half-eaten the a b",
    "no. 5 in no. in 3 in. or 6 ft. or 5 lbs. at 5 p.m": "no. 5 in no in 3 in or 6 ft. or 5 lbs at 5 p.m",
    "vitamin C. It is. vitamin c. is Type A. a man": "vitamin c it is vitamin c. is type a. a man",
    "what?? ok!! a+b a*b a&b <b>bold</b> :) [x] {y}":
        "what ?? ok !! a + b a * b a & b <b> bold </b> :-rrb- -lsb- x -rsb- -lcb- y -rcb-",
    "café 50¢ £5 ½ 😀 a \u2013 b": "café 50 cents # 5 1/2 a b",
    "5'10\" man by 6' surfboard, 5'10 man, 5'10s": "5 10 man by 6 surfboard 5 '10 man 5 10s",
    "class of '98 in '95. ('97) the '20s '90s-style '90's '10s":
        "class of '98 in 95 -lrb- 97 -rrb- the '20s '90s style 90 's 10s",
    "": "",
    " . ,; ": "",
}  # fmt: skip


@pytest.mark.parametrize("text", RECORDED)
def test_recorded_tokens(text):
    assert ptb_tokenize(text) == RECORDED[text].split()


@given(st.text() | st.text("aA1 .,'-/:;()[]{}<>&@#$%*_\n\u2019", max_size=60))
def test_any_text_has_tokens_without_spaces(text):
    tokens = ptb_tokenize(text)
    assert all(tokens) and " ".join(tokens).split() == tokens
    assert not PUNCTUATION.intersection(tokens)


def test_no_line_makes_a_rule_backtrack_for_ever():
    for unit in ("a.", "a-", "<a", "a@", "a'", "1,", "_", ".", "(", "a/b/", "http://"):
        assert "".join(ptb_tokenize(unit * 3000 + " end"))[-3:] == "end"


def test_every_caption_is_tokenised_as_by_java(tmp_path):
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no java on PATH")
    texts = [*RECORDED, *captions(2000, seed=3)]
    (tmp_path / "captions.txt").write_text("\n".join(texts), encoding="utf-8")
    folder = next(iter(importlib.util.find_spec("pycocoevalcap").submodule_search_locations))
    jar = Path(folder, "tokenizer", "stanford-corenlp-3.4.1.jar")
    main = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(tmp_path / "captions.txt"))
    done = subprocess.run(["java", "-cp", str(jar), *main], capture_output=True, check=True, text=True, timeout=60)
    lines = done.stdout.split("\n")[: len(texts)]
    for text, line in zip(texts, lines, strict=True):
        expected = [word for token in line.split(" ") if token not in PUNCTUATION for word in token.split()]
        assert ptb_tokenize(text) == expected, text
