# SPDX-License-Identifier: Apache-2.0
"""What class a folder, a label or a name means."""
import unicodedata

import numpy as np
import pytest

from dnnlib import UserError
from dnnlib.classes import Classes, is_fraction, is_unnamed, match, number_names, whole_number, with_several

DIGITS = Classes([str(i) for i in range(10)])
ANIMALS = Classes(["cat", "dog", "owl"])
UNNAMED = Classes(None, 3)
CAFE = "caf\u00e9"


def found(given, known, used=None):
    return match("--images=x", given, "the judge", known, "do so", used).indices


def refused(given, known, *parts, used=None):
    with pytest.raises(UserError) as info:
        found(given, known, used)
    for part in ("--images=x", "the judge", "do so", *parts):
        assert part in str(info.value)

#----------------------------------------------------------------------------

@pytest.mark.parametrize(("value", "number"), [
    (3, 3), ("3", 3), ("03", 3), (" 3 ", 3), (3.0, 3), ("3.0", 3), ("+3", 3), (np.int64(3), 3), (np.float32(3), 3),
    ("-1", -1), (3.5, None), ("3.5", None), ("1e3", None), (True, None), (float("nan"), None), (float("inf"), None),
    ("\u00b2", None), ("\u0663", None), ("", None), ("cat", None), (None, None), ([3], None), ("9" * 5000, None)])
def test_numbers(value, number):
    assert whole_number(value) == number


def test_fractions_are_no_classes():
    assert [is_fraction(x) for x in (2.5, "2.5", "-.5", 2.0, "2.0", "v2.5", True)] == [True] * 3 + [False] * 4


def test_numbers_in_their_order_and_words_in_that_of_text():
    assert number_names("x", ["10", "2", "1", "10"]) == ([2, 1, 0, 2], ["1", "2", "10"])
    assert number_names("x", ["c10", "c2"])[1] == ["c10", "c2"]
    assert number_names("x", ["10", "2", "other"])[1] == ["10", "2", "other"]


def test_one_name_of_two_spellings():
    parts = unicodedata.normalize("NFD", CAFE)
    assert number_names("x", [CAFE, parts]) == ([0, 0], [CAFE])
    assert Classes([parts]).find(CAFE) == Classes([CAFE]).find(parts) == 0
    with pytest.raises(UserError, match="x: 01 and 1 mean the same class"):
        number_names("x", ["1", "01"])


def test_a_class_by_name_or_number():
    assert [ANIMALS.find(x) for x in ("owl", "2", "2.0", "3", "-1", "ow", "\u00b2")] == [2, 2, 2] + 4 * [None]
    assert [DIGITS.find(x) for x in ("7", "07", "10", "seven")] == [7, 7, None, None]
    some = Classes(["3", "7"])          # Here numbers are names.
    assert [some.find(x) for x in ("7", "7.0", "1")] == [1, 1, None]
    assert [some.index(x) for x in (1, 1.0, "7", 2, -1, 0.5)] == [1, 1, 1, None, None, None]

#----------------------------------------------------------------------------

def test_names_decide():
    assert found(Classes(["owl", "cat"]), ANIMALS) == [2, 0]
    assert found(Classes(["3", "7"]), DIGITS) == [3, 7]
    assert found(Classes(["0", "1", "10", "2"]), Classes(["0", "1", "2", "10"])) == [0, 1, 3, 2]
    assert found(Classes(["03.0"]), Classes(["3", "7"])) == [0]


def test_what_does_not_match_shows_both_lists():
    refused(Classes(["three", "seven"]), DIGITS, "has the classes three, seven", "the judge has 0, 1, 2, 3",
            "none called three, seven")
    refused(Classes(["cat", "cow"]), ANIMALS, "classes cat, cow", "has cat, dog, owl, and none called cow")
    refused(Classes(["1", "5"]), Classes(["3", "7"]), "none called 1, 5")
    refused(Classes([f"c{i}" for i in range(1000)]), ANIMALS, "and 990 more")
    refused(Classes(["cat", "2"]), ANIMALS, "none called 2")             # Among words a number is a word.
    refused(Classes(["1", "01"]), ANIMALS, "two mean the same one")


def test_classes_that_do_not_occur_need_no_partner():
    assert found(Classes(["cat", "cow", "owl"]), ANIMALS, used=[0, 2]) == [0, -1, 2]
    assert found(Classes(None, 8), Classes(["3", "7"]), used=[3, 7])[7] == 1
    refused(Classes(None, 4), ANIMALS, "none called 3", used=[0, 3])


def test_numbers_of_words_are_indices():
    made = match("--images=x", Classes(["0", "2"]), "the judge", ANIMALS, "do so")
    assert made.indices == [0, 2]
    assert "taken as indices of the classes of the judge: 0 is cat, 2 is owl" in made.note
    assert match("--images=x", ANIMALS, "the judge", ANIMALS, "do so").note is None
    assert match("--images=x", Classes(None, 0), "the judge", ANIMALS, "do so").note is None


def test_a_side_without_names():
    made = match("--images=x", ANIMALS, "the judge", UNNAMED, "do so")
    assert made.indices == [0, 1, 2]
    assert "has no names of classes: those of --images=x are taken in their order: cat, dog, owl" in made.note
    refused(Classes(["cat", "dog"]), UNNAMED, "has 2 classes, cat, dog, but the judge has 3 without names")
    assert found(Classes(["2"]), UNNAMED) == [2]
    assert found(UNNAMED, ANIMALS) == [0, 1, 2]


def test_numbers_in_order_are_no_names():
    assert [is_unnamed(x) for x in (None, [], ["0", "1"], ["1", "0"], ["a"])] == [True, True, True, False, False]

#----------------------------------------------------------------------------

def test_labels_of_several_values():
    assert with_several(["tench, Tinca tinca", "great white shark", "cat", 3, 2.0, "iphone", "iphone 5"]) == []
    assert with_several(["cat", "dog", "cat|dog"]) == ["cat|dog"]
    assert with_several(["cat", "dog", "['cat', 'dog']"]) == ["['cat', 'dog']"]
    assert with_several(["1 5", "3;4", "[1, 2]", "3"]) == ["1 5", "3;4", "[1, 2]"]
    assert with_several([[1, 2], 3, {"a": 1}]) == [[1, 2], {"a": 1}]


def test_a_name_of_two_classes_is_asked_back():
    """Files of others may have such: which of them is meant, nobody knows."""
    known = Classes(["cat", "dog", "cat"])
    assert (known.find("dog"), known.find("2")) == (1, 2)
    for ask in (lambda: known.find("cat"), lambda: known.find_all(["dog", "cat"])):
        with pytest.raises(UserError, match="cat: the classes 0, 2 have this name: call them by these numbers"):
            ask()
