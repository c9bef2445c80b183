import pytest

from qwenvl_jax.demo.display import readable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("A red circle.", "A red circle."),
        ("<ref>the cat</ref><box>(1,2),(3,4)</box>", "the cat"),
        ("<ref>猫</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>和狗", "猫和狗"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("<box>(1,2),(3,4)</box>", ""),
    ],
)
def test_box_notation_is_hidden(text, shown):
    assert readable(text) == shown


def test_a_growing_reply_never_shows_a_piece_of_a_tag():
    text = "See <ref>the cat</ref><box>(1,2),(3,4)</box>, left."
    shown = [readable(text[:n]) for n in range(len(text) + 1)]
    assert shown[-1] == "See the cat, left."
    for earlier in shown:
        assert shown[-1].startswith(earlier)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<ref>the cat</ref><box>(1,2),(3,4)</box>", "the cat [1]"),
        ("<ref>猫</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>和狗", "猫 [1] [2]和狗"),
        ("<box>(1,2),(3,4)</box>", "[1]"),
        ("a <box>(1,2),(3,4000)</box>b<box>(1,2),(3,4)</box>", "a b [1]"),
        ("the cat<box>(1,2),(3", "the cat"),
    ],
)
def test_boxes_leave_their_numbers_where_they_are_drawn(text, shown):
    assert readable(text, numbered=True) == shown
