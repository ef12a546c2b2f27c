"""A worked solution in, the same without the words that commit to a letter out.

AQuA's rationales mostly end in "Answer: C" or one of a hundred ways to say so. `tasks.rows` cuts
that off, and `base.solution_text` writes the one line that is graded in its place, under whatever
letter the right option has by then.

Measured on the 12,490 rationales of AQuA-RAT and MathQA: 75 % lose such words.
About 4 % may still name a letter further up ("only option C fits"). Those words are left, since
cutting them would break sentences; `names_an_option` finds them, so that such a solution is never
shown under other letters (`base.shuffled_options`).
"""

from __future__ import annotations

import re

_CALLED = r"(?:answer|ans|option|choice)s?"
_LETTER = r"[(\[{\"'\u201c\u2018*]*\s*(?P<letter>[A-Ea-e])\s*[)\]}\"'\u201d\u2019*]*"
_HENCE = r"(?:so|hence|thus|therefore|and|is|i\s?\.\s?e|=\s?>|⇒|∴|-+>)"
_THE = r"(?:(?:the|our|my|correct|right|final|required|only|best|oa)\s*(?:,\s*)?)*"
_IS = (
    rf"(?:(?:is|are|will|would|should|must|definitely|be|therefore|thus|the|correct|right|{_CALLED})"
    r"\b|[\s,:=>\u2013\u2014-])*"
)
_END = r"[\s.,!;:]*\Z"
_NAMED = (
    rf"(?P<cut>(?<![A-Za-z])(?:{_HENCE}\s*(?:[,:.]\s*)?)*{_THE}[(\[]?{_CALLED}\b\.?{_IS}"
    rf"(?<![A-Za-z]){_LETTER}"
)
# "Answer: C", "ANSWER IS B", "so, the correct option is (d).", "(ans b)"
NAMED = re.compile(rf"{_NAMED}){_END}", re.IGNORECASE)
# "Answer: C) 45 days", "the answer is option c = 45", "Answer A 45"
NAMED_WITH_OPTION = re.compile(rf"{_NAMED}(?:(?<=\))|\s*[).:=($\d]))[^\n]{{0,40}}\Z", re.IGNORECASE)
# "hence c is the correct answer", "a is the ans"
NAMED_AFTER = re.compile(
    rf"(?P<cut>(?<![A-Za-z])(?:{_HENCE}\s*(?:[,:.]\s*)?)*(?:{_CALLED}\s*)?{_LETTER}\s*"
    rf"(?:is|it\s+is|are|-|=)?\s*{_THE}(?:{_CALLED})[)\]]?){_END}",
    re.IGNORECASE,
)
# "... = 45 days. C", "25/32=D": a lone letter.
_UNIT = r"(?:days?|hours?|hrs?|years?|min(?:ute)?s?|sec(?:ond)?s?|kmph|km|cm|m|meters?|kg|rs)"
_CLEARLY = r"(?:hence|so|thus|therefore|is|=\s?>|⇒|∴|-+>)"
LONE = re.compile(
    rf"(?:\A|\n|(?<=[.;:,!?)\]])|(?<=[\d%)\]}}])(?:\s+|(?=\s*=\s*(?-i:[A-E])\W*\Z))"
    rf"|\b{_UNIT}\s+|(?<=\s)(?={_CLEARLY}\b))"
    rf"(?P<cut>(?:{_CLEARLY}\s*(?:[,:]\s*)?|=\s|\s*=\s*(?=(?-i:[A-E])))?{_LETTER}){_END}",
    re.IGNORECASE,
)

# "option C", "choices a", "answer is (b)"; "(D)"; a line "E. 4^10"; "C is out". Formulas such as
# P(A) match too: to keep an order for nothing costs little, a wrong letter would be learned.
NAMED_WITHIN = re.compile(
    rf"\b{_CALLED}\b\.?\s*(?:is|are|:|=)?\s*[(\[]?[A-E]\b"
    r"|[(\[]\s*[A-E]\s*[)\]]"
    r"|(?-i:^[ \t]*[A-E]\s*[).:])"
    r"|(?-i:\b[A-E])\s+(?:is|are)\s+(?:the\s+)?(?:correct|right|wrong|incorrect|out|answer)\b",
    re.IGNORECASE | re.MULTILINE,
)

LONGEST_COMMITMENT = 120
"""Characters at a text's end within which such words are looked for."""


def without_answer_line(rationale: str, letter: str) -> str:
    """Return a worked solution without the words that commit to a letter at its end.

    Args:
        rationale: As written: "...\\nAnswer: C", "... = 45. the correct option is (c) 45", ...
        letter: The label. A named letter ("Answer: D") goes in any case, since a wrong one would
            contradict the label; a lone letter, or one with more text after it, only if it is
            the label.

    Returns:
        The rest, stripped. Lines that hold nothing but a named letter go wherever they stand.
    """
    lines = [
        line
        for line in rationale.split("\n")
        if len(line) > LONGEST_COMMITMENT or not NAMED.match(line.strip())
    ]
    text = "\n".join(lines).strip()
    while (cut := _start_of_commitment(text, letter)) is not None:
        text = text[:cut].rstrip()
    return text


def _start_of_commitment(text: str, letter: str) -> int | None:
    begin = max(0, len(text) - LONGEST_COMMITMENT)
    for pattern in (NAMED, NAMED_AFTER, NAMED_WITH_OPTION, LONE):
        match = pattern.search(text, begin)
        if match and (pattern is NAMED or match["letter"].upper() == letter):
            return match.start("cut")
    return None


def names_an_option(rationale: str) -> bool:
    """Return whether a worked solution seems to call an option by its letter."""
    return NAMED_WITHIN.search(rationale) is not None
