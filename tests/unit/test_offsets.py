import pytest
from hypothesis import given
from hypothesis import strategies as st

from erniem_batch.text.offsets import OFFSET_UNITS, Offsets

# How a program that counts in the unit cuts a text.
SLICES = {
    "codepoint": lambda text, a, b: text[a:b],
    "utf16": lambda text, a, b: text.encode("utf-16-le")[2 * a : 2 * b].decode("utf-16-le"),
    "byte": lambda text, a, b: text.encode("utf-8")[a:b].decode("utf-8"),
}
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.text("ab é北😀𠮷\u200d\n")


def test_there_is_a_slice_for_every_unit():
    assert set(SLICES) == set(OFFSET_UNITS)


@pytest.mark.parametrize("unit", OFFSET_UNITS)
@given(text=TEXTS, data=st.data())
def test_cutting_in_any_unit_gives_the_same_text(unit, text, data):
    """Of every span; and places grow with the text."""
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    place = Offsets(text, unit)
    assert SLICES[unit](text, place(a), place(b)) == text[a:b]
    places = [place(i) for i in range(len(text) + 1)]
    assert places == sorted(set(places))
    assert SLICES[unit](text, 0, places[-1]) == text
    assert SLICES[unit](text, places[-1], places[-1] + 9) == ""


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("codepoint", [0, 1, 2, 3, 4]), ("utf16", [0, 1, 3, 4, 5]), ("byte", [0, 1, 5, 8, 10])],
)
def test_widths(unit, expected):
    place = Offsets("a😀北é", unit)
    found = [place(i) for i in range(5)]
    assert found == expected
    assert {type(i) for i in found} == {int}


@pytest.mark.parametrize("unit", OFFSET_UNITS)
def test_ascii_needs_no_table(unit):
    assert Offsets("plain", unit)(4) == 4
    assert Offsets("", unit)(0) == 0


def test_a_place_behind_the_text_is_no_place():
    with pytest.raises(IndexError):
        Offsets("é", "byte")(2)
