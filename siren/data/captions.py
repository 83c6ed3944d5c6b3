"""Clean-up of captions by rule (paper, appendix A): removal of what describes no sound, and normal acoustic terms.

The rules are for what language models write about sound ("The audio contains ... can be heard, which creates a tense
mood") and do little to what people wrote. They are heuristics for English: each is small, and a caption that they
would leave as nonsense is dropped with a reason. The paper has Qwen-2.5 apply such rules; captioner.py has that too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

MAX_WORDS = 40
_MAX_CHARACTERS = 4000

_VOICE = "says|said|saying|speaks|speaking|talks|talking|shouts|shouting|yells|yelling|whispers|whispering|asks|asking"
_VOICE += "|announces|announcing|states|stating|replies|replying|exclaims|exclaiming|sings|singing"
_HEARD = r"(?:can|could|may) (?:also |clearly |faintly )?be heard|(?:is|are|was|were) (?:also |clearly |faintly )?heard"
_PIECE = "clip|recording|track|file|sample|segment"
_CLIP = rf"(?:\w+ )?(?:audio|recording|soundscape|clip|(?:audio|sound|video) (?:{_PIECE}))"
_CONTAINS = "contains?|features?|captures?|consists? of|presents?|depicts?|includes?|has|is of|is|of|with|records?"
_CONTAINS += "|begins with|starts with|opens with|showcases?|describes?|comprises?"
_MOOD = (
    r"(?=[^.;]*\b(?:moods?|atmospheres?|ambian|ambien|emotion|feeling|sense of|tension|suspense|urgency|calm|scene))"
)

# A sentence that matches says nothing about the sound: it speaks of the mood, of the recording, or of the model.
_EMPTY_SENTENCES = re.compile(
    r"\b(?:mood|atmosphere|ambiance|ambience|emotions?) (?:of [\w ]+ )?(?:is|was|seems|feels)\b"
    rf"|^(?:it|this|which|they|these|the \w+) (?:creates?|gives?|adds?) {_MOOD}"
    r"|^(?:it|this|which|they|these) (?:evokes?|suggests?|conveys?|implies|imply|indicates?)\b"
    r"|^overall\b|^(?:the|there is an?) (?:overall|general|emotional)\b|^there (?:is|are) no\b"
    r"|\b(?:sample rate|bit ?rate|hertz|khz|in mono|in stereo|high quality|low quality|recorded in|transcri\w+)\b"
    r"|^(?:the )?(?:speech|spoken|vocal) (?:content|words|text)\b|^(?:the )?(?:lyrics|words) (?:are|is)\b"
)
_REFUSAL = re.compile(
    r"\b(?:i'm sorry|i am sorry|as an ai|language model|i cannot|i can't|i am unable|i'm unable|please provide|no audio"
    r"|unable to (?:hear|listen|determine)|cannot (?:be )?(?:determined?|hear|listen))\b"
)
# What introduces or ends a caption without describing anything, in the order in which it is taken off.
_BOILERPLATE = [
    (rf"^(?:in|throughout) (?:this|the) {_CLIP},? (?:we|you|one|i) (?:can )?(?:also )?hear ", ""),
    (rf"^(?:in|throughout) (?:this|the) {_CLIP},? ", ""),
    (r"^(?:we|you|one|i) (?:can )?(?:also )?hear ", ""),
    (rf"^(?:this is an?|this|the|an?) {_CLIP} (?:that )?(?:mainly |primarily |also )?(?:{_CONTAINS})(?: |$)", ""),
    (r"^(?:this|it) is (?=(?:an?|the) )", ""),
    (r"^(?:there (?:is|are)|it (?:contains|has|sounds like)) ", ""),
    (r"^(?:an? |the )?(?:audio )?(?:sounds?|noises?|recordings?|audio) of ", ""),
    (r"^here,? ", ""),
    (rf"\b(?:{_HEARD}) (?=\w+ing\b)", ""),
    (rf"\b(?:{_HEARD})\b", ""),
    (rf",? (?:(?:which|that) )?(?:creat|giv|add|contribut)(?:es?|s|ing) {_MOOD}[^.;]*", ""),
    (r",? (?:(?:which|that) )?(?:evokes?|evoking|conveys?|conveying|suggests?|suggesting) [^.;]*", ""),
]
# Acoustic terms: what is said in several ways is said in one. The first two rows are the paper's examples.
_TERMS = [
    (r"\blow[- ]pitched rumbl(?:e|es|ing)\b", "engine noise"),
    (r"\bdog(s?) (?:is |are |was |were )?barking\b", r"dog bark\1"),
    (r"\bbarking dogs\b", "dog barks"),
    (r"\bbarking dog\b", "dog bark"),
    (r"^barking\b", "dog bark"),
    (r"\bfoot[- ]steps?\b|\bfootfalls?\b", "footsteps"),
    (r"\b(?:an? )?(?:thunder[- ]?claps?|claps? of thunder|rolls? of thunder)\b", "thunder"),
    (r"\bgun[- ]shot(s?)\b", r"gunshot\1"),
    (r"\brain[- ]fall(?:ing)?\b", "rainfall"),
    (r"\bautomobile(s?)\b", r"car\1"),
    (r"\bair[- ]plane(s?)\b|\baeroplane(s?)\b", r"airplane\1\2"),
    (r"\bmotor[- ]cycle(s?)\b|\bmotor[- ]?bike(s?)\b", r"motorcycle\1\2"),
    (r"\b(?:miaow|mew)(s|ing|ed)?\b", r"meow\1"),
    (r"\badult males?\b|\bmale (?:voice|speaker)\b", "man"),
    (r"\badult females?\b|\bfemale (?:voice|speaker)\b", "woman"),
    (r"\bin the back ground\b", "in the background"),
    (r"\ba (?=engine noise\b|airplane\b)", "an "),
    (r"\ban (?=man\b|woman\b|cars?\b)", "a "),
]
# Function words that no English caption has, and words that nearly every English one has.
_FOREIGN = re.compile(
    r"\b(?:el|los|las|una|unos|del|que|y|por|con|para|está|suena|le|les|une|dans|avec|et|sur|du|est|der|das|und|ein|eine"
    r"|mit|auf|ist|nicht|il|gli|della|che|di|uno|sono|os|uma|na|não|em|het|een)\b"
)
_ENGLISH = re.compile(
    r"\b(?:a|an|the|and|of|in|on|with|is|are|as|by|at|to|from|while|then|followed|it|its|into|over|near|someone)\b"
)
_PLAIN_MARKS = str.maketrans("‘’“”«»–—", '\'\'""""--')


class Cleaned(NamedTuple):
    """A caption, or the reason why there is none."""

    text: str | None
    reason: str | None = None


def clean_caption(text: str, max_words: int = MAX_WORDS) -> Cleaned:
    """A caption in lower case without boilerplate, quoted speech, moods and final stop; or why it is dropped.

    Whole sentences are kept up to `max_words` words. Reasons: "empty", "not English", "a refusal", "describes no
    sound", "too long", "repeats itself". What is clean stays as it is: cleaning twice is cleaning once.
    """
    result = _clean(text, max_words)
    while result.text is not None and result.text != text:  # one removal may uncover another
        text = result.text
        result = _clean(text, max_words)
    return result


def clean_captions(texts: Iterable[str], max_words: int = MAX_WORDS) -> tuple[list[str], list[str]]:
    """The distinct clean captions of a clip's candidates, in their order, and the reasons why others were dropped."""
    cleaned = [clean_caption(text, max_words) for text in texts]
    kept = dict.fromkeys(result.text for result in cleaned if result.text is not None)
    return list(kept), [result.reason for result in cleaned if result.reason is not None]


def _clean(text: str, max_words: int) -> Cleaned:
    text = _plain(text)
    if not text:
        return Cleaned(None, "empty")
    if len(text) > _MAX_CHARACTERS:
        return Cleaned(None, "too long")
    text = _without_speech(text)
    if _REFUSAL.search(text):
        return Cleaned(None, "a refusal")
    if not _is_english(text):
        return Cleaned(None, "not English")
    sentences = []
    for sentence in re.split(r"(?<=[.!?;])\s+", text):
        sentence = _tidy(sentence)
        if sentence and not _EMPTY_SENTENCES.search(sentence) and (sentence := _describe(sentence)):
            sentences.append(sentence)
    if not sentences:
        return Cleaned(None, "describes no sound")
    kept: list[str] = []
    for sentence in dict.fromkeys(sentences):
        if sum(len(part.split()) for part in (*kept, sentence)) > max_words:
            break
        kept.append(sentence)
    if not kept:
        return Cleaned(None, "too long")
    words = " ".join(kept).split()
    if len(words) >= 6 and len(set(words)) <= len(words) // 3:
        return Cleaned(None, "repeats itself")
    return Cleaned(". ".join(kept))


def _plain(text: str) -> str:
    """One line of lower case with plain quotes and dashes, without list marks and markup."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = text.translate(_PLAIN_MARKS)
    text = " ".join("".join(" " if unicodedata.category(c)[0] == "C" else c for c in text).split())
    text = re.sub(r"(?<=[^\W_])[_|]+(?=[^\W_])", " ", text)  # "dog_bark": the words of a class
    text = re.sub(r"[*_#`~|]+", "", text)
    text = re.sub(r"^(?:\d{1,2}[.)]|[-•·>]|caption(?: \d+)?:|description:)\s+", "", text).strip()
    inside = re.fullmatch(r'"([^"]*)"\.?|\'([^\']*)\'\.?', text)
    return (inside.group(1) or inside.group(2) or "").strip() if inside else text


def _without_speech(text: str) -> str:
    """Take out what is said, and leave that somebody speaks. Quotes around one or two words are of sounds: "beep"."""
    quote = r'(?:"[^"]*"|\'(?:[^\']|\'(?=\w))*\'(?!\w))'
    text = re.sub(rf"\b({_VOICE})(?: that| the words?| the phrase| something like)?[:,]? {quote}", r"\1", text)
    text = re.sub(rf"\b({_VOICE}) that\b[^.;,]*", r"\1", text)
    text = re.sub(r'"(?=[^"]*\s[^"]*\s)[^"]*"', "", text)
    text = re.sub(r"\b(?:says|said)\b", "speaks", text)
    return re.sub(r"\bsaying\b", "speaking", text).replace('"', "")


def _is_english(text: str) -> bool:
    """Latin letters only, and not more function words of other languages than of English."""
    if any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN") for c in text):
        return False
    return len(_FOREIGN.findall(text)) <= len(_ENGLISH.findall(text))


def _describe(sentence: str) -> str:
    """A sentence without its boilerplate, in normal terms; empty if nothing is left."""
    for pattern, replacement in (*_BOILERPLATE, *_TERMS):
        sentence, count = re.subn(pattern, replacement, sentence)
        sentence = _tidy(sentence) if count else sentence
    return sentence if re.search(r"[^\W\d_]{2}", sentence) else ""


def _tidy(sentence: str) -> str:
    sentence = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(sentence.split()))
    sentence = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", sentence)
    return re.sub(r"\s*\b(?:and|with|of|which|that|,)*$", "", sentence.strip(" ,.;:!?-")).strip(" ,.;:!?-")
