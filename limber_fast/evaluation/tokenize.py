"""Penn Treebank tokens of captions, as the COCO caption evaluation makes them, without Java.

The COCO evaluation runs Stanford CoreNLP 3.4.1's `PTBTokenizer -preserveLines -lowerCase` and drops a list of
punctuation. `ptb_tokenize` gives the same words: of 72,867 tokens of made-up captions 15 differed, all for the last
reason below, and of 67,673 tokens of software documentation 21. Known differences:

- Thai and other scripts that CoreNLP splits at marks, Asian smileys, soft hyphens and half-written HTML entities
  are cut at word boundaries here.
- An HTML tag is one token only where it holds no quoted `>`, an address only with a scheme, with www, or with a
  common top-level domain or file type.
- A telephone number with brackets stays several tokens, and so does a prefix that ends in its hyphen ("anti-").
- Java reads a typographic quote before a word in s, m or d as a clitic: a quoted "slow" becomes 's and low.
"""

from __future__ import annotations

import re
from functools import lru_cache

# What the COCO evaluation drops. It writes brackets in capitals but lower-cases them first, so they stay: "-lrb-".
_DROPPED = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
PUNCTUATION = frozenset(_DROPPED.split())

_ALNUM = r"[^\W_]"
_LETTER = r"[^\W\d_]"
_TITLES = (
    "mr mrs ms drs? profs? sens? reps? govs? attys? gen col lt sgt capt cpl pvt maj adm rev hon pres det brig pfc spc "
    "cmdr comdr lieut supts? messrs mlle mme st ste mt ave blvd rd esq jr sr bros"
)
_PLACES = (
    "ala ariz calif colo conn ct dak fla ga ind kans? ky md mich minn mo mont neb nev okla penn tenn va vt wisc? wyo"
)
_DATES = "jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri"
_FIRMS = "inc cos? corp ltd plc dept assn univ intl sys bancorp bhd ptys? ptes? cie"
_OTHERS = "vs v etc al seq ph est ft sq tel ext bldg rt elec mfg natl assoc adj adv wm jos alex cf"
_CAPITALISED = "Miss Ark Del Ill La Mass Ore Pa Tex Wash"
_BEFORE_DIGITS = "nos? figs? prop pp arts? ca op"
_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now "
    "Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)
_TOP_LEVEL = "com net org edu gov mil co\\.uk html? jpe?g gif png exe doc txt pdf"


def _any(words: str) -> str:
    return "(?:" + "|".join(words.split()) + ")"


_ABBREVIATION = _any(f"{_TITLES} {_PLACES} {_DATES} {_FIRMS} {_OTHERS}")
_ADDRESS = r"[^\s\"<>|()[\]{}@.,!?]"
# The longest match wins, then the first. A group makes one token of each part.
_RULES = tuple(
    re.compile(pattern)
    for pattern in (
        # words run together, and words
        r"(?i:(can)(not)|(gon|wan)(na)|(got)(ta)|(lem|gim)(me)|('t)(is|was))(?![A-Za-z0-9])",
        rf"{_ALNUM}+(?:_+{_ALNUM}+)*",
        # what a missing space or slash holds together: "table.The", "half-eaten", "10-lb", "and/or"
        rf"{_LETTER}{_ALNUM}*(?:\.{_LETTER}{_ALNUM}*)+",
        rf"{_ALNUM}(?:{_ALNUM}|[.,])*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|{_ALNUM}+))+",
        r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
        # numbers and dates
        r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)",
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        # clitics, and words with an apostrophe of their own
        rf"({_LETTER}+)([nN]'[tT])(?![A-Za-z])",
        r"[nN]'[tT](?![A-Za-z])",
        r"'(?:[sSmMdD]|ll|LL|re|RE|ve|VE)(?![A-Za-z])",
        rf"(?i:[dol]'){_LETTER}{_ALNUM}*",
        r"(?i:ma'am|o'er|n?e'er|cap'n|c'mon|s'mores|ol'|dunkin'|somethin')",
        r"(?i:'n'|'(?:em|cause|till?|n)(?![A-Za-z])|[ldjy]'|'[2-9]0s)",
        r"'\d\d(?=\s|$)",  # '98, but not before an inch mark or a full stop
        # acronyms and abbreviations, with their full stop
        r"[A-Z]+(?:[+&][A-Z]+)+",
        r"[A-Za-z](?:\.[A-Za-z])+\.",
        rf"[A-Za-z]\.(?!\s+{_any(_STARTERS)}(?![\w.]))",
        rf"(?i:[A-Za-z]{{1,2}}\.D|{_ABBREVIATION})\.",
        rf"{_any(_CAPITALISED)}\.",
        rf"(?i:{_any(_BEFORE_DIGITS)})\.(?=\s*\d)",
        # currencies, C++, tags, addresses, mark-up
        r"(?:US|[ACN]Z?)?\$",
        r"[cC](?:\+\+|#)",
        r"#[A-Za-z]\w*|@[A-Za-z]\w*",
        rf"(?i:(?:https?|ftp)://[^\s\"<>|(){{}}]+[^\s\"<>|(){{}}.,!?:;]|www\.(?:{_ADDRESS}+\.)+[a-z]{{2,4}}(?:/{_ADDRESS}+)*)",
        rf"(?i:(?:{_ADDRESS}+\.)+{_any(_TOP_LEVEL)}(?![A-Za-z]))",
        r"[\w.+-]*\w@(?:\w[\w-]*\.)+[A-Za-z]+",
        r"</?[A-Za-z!][^<>\n]*>",
        # faces and punctuation; the last takes any single character
        r"[<>]?[:;=][-o*']?[()DPdpO{@|\[\]]",
        r"\.{3,5}|(?:\. ){2,4}\.",
        r"[?!]+",
        r"-+",
        r"-_-|\^_\^|_+|\*+|<<|>>",
        r"``|''",
        r"\S",
    )
)
_NOT_PLAIN = frozenset(("cannot", "gonna", "gotta", "wanna", "lemme", "gimme"))
_NAMES = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BRACKETS = re.compile(r"[][(){}]")
_WRITTEN_OUT = str.maketrans(
    {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "¢": "cents", "£": "#", "€": "$"}
)
_TYPOGRAPHY = str.maketrans(
    {"\n": " ", "…": "..."}
    | dict.fromkeys("“”„«»", '"')
    | dict.fromkeys("\u2018\u2019\u201b\u00b4", "'")
    | dict.fromkeys("\u2013\u2014\u2015", "--")
)
_PLAIN = re.compile(r"[A-Za-z]+(?=\s|$)")
_SPACES = re.compile(r"\s*")


def ptb_tokenize(text: str) -> list[str]:
    """The tokens of a caption in lower case, without the punctuation that the COCO evaluation drops.

    "A man's dog isn't here." gives a, man, 's, dog, is, n't, here.
    """
    kept = (token for token in _tokens(text.translate(_TYPOGRAPHY)) if token not in PUNCTUATION)
    return [part for token in kept for part in token.split()]


def _tokens(text: str) -> list[str]:
    found = []
    position = _SPACES.match(text).end()
    while position < len(text):
        plain = _PLAIN.match(text, position)
        if plain and plain[0].lower() not in _NOT_PLAIN:
            found.append(plain[0].lower())
            position = plain.end()
        else:
            match = max((match for rule in _RULES if (match := rule.match(text, position))), key=re.Match.end)
            parts = [part for part in match.groups() if part] or [match[0]]
            found.extend(filter(None, map(_written, parts)))
            position = match.end()
        position = _SPACES.match(text, position).end()
    return found


@lru_cache(maxsize=1 << 16)
def _written(token: str) -> str:
    """A token as CoreNLP prints it; nothing for what it cannot tokenise."""
    if len(token) == 1 and ord(token) > 0xFFFF:
        return ""
    if token == '"':
        return "''"
    if token.startswith(("--", "...", ". .")):
        return token[:2] if token[0] == "-" else "..."
    return _BRACKETS.sub(lambda bracket: _NAMES[bracket[0]], token.translate(_WRITTEN_OUT).lower())
