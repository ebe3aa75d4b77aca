"""TextVQA's accuracy of one answer, as its official scorer counts it.

The rules are those of EvalAIAnswerProcessor and TextVQAAccuracyEvaluator in MMF (pythia/tasks/processors.py,
https://github.com/facebookresearch/mmf), which LLaVA and MGM use. Published scores rest on what that code does, not on
what it was meant to do, so that its oddities are kept, each told where it happens.
"""

import re


NUM_ANSWERS = 10
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(value) for value, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
# The original has the comma and the question mark too; they are gone by the time it looks.
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
# "(?!<=" looks ahead for the text "<=" where "(?<=" (behind, for a digit) was meant. No full stop starts with "<=":
# every one matches that no digit follows, that of "3." too.
FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")
# The original hands re.UNICODE over where a pattern's `sub` expects the number of replacements.
MAX_FULL_STOPS = int(re.UNICODE)  # 32

CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def contraction_map(words: list[str]) -> dict[str, str]:
    """Every spelling that lacks one apostrophe to the right one. "somebody'd" alone goes the other way."""
    positions = [(word, i) for word in words for i, character in enumerate(word) if character == "'"]
    return {word[:i] + word[i + 1 :]: word for word, i in positions} | {"somebody'd": "somebodyd"}


CONTRACTIONS = contraction_map(CONTRACTED)


def textvqa_score(prediction: str, answers: list[str]) -> float:
    """0 to 1: the mean, over leaving each of the ten answers out, of min(1, matches among the other nine / 3).

    Raises:
        ValueError: there are not ten answers.
    """
    if len(answers) != NUM_ANSWERS:
        raise ValueError(f"TextVQA has {NUM_ANSWERS} answers to a question, here are {len(answers)}")
    prediction = normalize(prediction)
    matches = [normalize(answer) == prediction for answer in answers]
    if not any(matches):
        return 0.0
    return sum(min(1, (sum(matches) - is_match) / 3) for is_match in matches) / NUM_ANSWERS


def normalize(text: str) -> str:
    """Lower case, numbers as digits, no articles, no punctuation except inside words."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [DIGITS.get(word, word) for word in strip_punctuation(text).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def strip_punctuation(text: str) -> str:
    """A mark that stands beside a space anywhere in the text disappears everywhere; others become spaces."""
    stripped = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space else " ")
    return FULL_STOP.sub("", stripped, count=MAX_FULL_STOPS)
