"""TextVQA's score against values worked out by hand from the official scorer's rules, its oddities included."""

import pytest

from eval import textvqa_score
from evaluation.tasks.textvqa_score import CONTRACTIONS, normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Coca-Cola ", "coca cola"),  # the hyphen stands between letters: a space
        ("coca- cola", "coca cola"),  # beside a space: gone
        ("a-b - c", "ab c"),  # one hyphen beside a space takes all of them along
        ("1,000", "1000"),  # commas go first
        ("red,green", "redgreen"),
        ("yes, sir", "yes sir"),
        ("what?", "what"),
        ("dog's", "dog 's"),
        ("none", "0"),
        ("Ten apples", "10 apples"),
        ("an apple a day", "apple day"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("couldntve", "couldntve"),  # lacks two apostrophes: not in the map
        ("ID'VE", "id've"),  # the map's "Id've" begins with a capital and never matches
        ("3.", "3"),  # the typo in the pattern: a digit in front does not keep the full stop
        ("3.5", "3.5"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("..5", ".5"),
        ("\n\tline\none\t", "line 1"),
        ("a", ""),
        ("(b) 'c'", "b 'c'"),
        ("x;y", "x y"),
        ("tab\tand-dash", "tab and dash"),
        ("ÉCOLE", "école"),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


def test_no_more_than_32_full_stops_go():
    assert normalize("x" + "." * 40) == "x" + "." * 8
    assert normalize("x" + "." * 32) == "x"


@pytest.mark.parametrize(
    ("num_matches", "score"),
    [(0, 0), (1, 9 * 1 / 3 / 10), (2, (2 * 1 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1), (10, 1)],
)
def test_leave_one_out(num_matches, score):
    """Each answer is left out in turn; min(1, matches among the nine others / 3), averaged over the ten."""
    answers = ["Pepsi."] * num_matches + [f"other {i}" for i in range(10 - num_matches)]
    assert textvqa_score("pepsi", answers) == pytest.approx(score, abs=1e-12)


def test_the_prediction_is_normalized_like_the_answers():
    assert textvqa_score("The number is two!", ["number is 2"] * 10) == 1
    assert textvqa_score("The number: two", ["number 2"] * 10) == 0, "a colon is no punctuation to the scorer"


def test_ten_answers():
    with pytest.raises(ValueError, match="10 answers"):
        textvqa_score("a", ["a"] * 9)


def test_contractions_lack_one_apostrophe():
    assert CONTRACTIONS["yall"] == "y'all" and CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'all'dve"]
    assert CONTRACTIONS["'ow'sat"] == "'ow's'at" and CONTRACTIONS["hed've"] == "he'd've"
    assert "shed" not in CONTRACTIONS and "id've" not in CONTRACTIONS
