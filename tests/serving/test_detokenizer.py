"""Text piece by piece is the text of all tokens, cut where the first stop string begins."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilib.model import tokenizer
from minilib.serving.detokenizer import TextStream

TEXTS = ["def forward(self, x):\n    return self.weight * x\n", "for x in range(10):\n    print(x)\n"] * 20
TRAINED = tokenizer.train(TEXTS, 320)
BYTES = tokenizer.train([], 257)  # one token per byte
CUT = "\ufffd"  # what stands for a character whose bytes are not all there


def pieces(words, ids, stop=()):
    """Everything that a stream gives for these tokens until it is stopped, piece by piece, then the rest."""
    stream, out = TextStream(words, stop), []
    for token in ids:
        text, stopped = stream.push(token)
        out.append(text)
        if stopped:
            return [*out, ""], True
    text, stopped = stream.finish()
    return [*out, text], stopped


def naive(words, ids, stop):
    """Decode all tokens anew after each one; text, whether it was stopped, and how many tokens that took."""
    for count in range(1, len(ids) + 1):
        text = words.decode(ids[:count]).rstrip(CUT)
        places = [text.find(one) for one in stop if one in text]
        if places:
            return text[: min(places)], True, count
    return words.decode(ids), False, len(ids)


@pytest.mark.parametrize("words", [TRAINED, BYTES], ids=["trained", "bytes"])
@given(text=st.text(max_size=30).filter(lambda text: not text.endswith(CUT)))
def test_pieces_joined_are_the_text(words, text):
    out, stopped = pieces(words, words.encode(text).ids)
    assert "".join(out) == text and not stopped


@pytest.mark.parametrize("words", [TRAINED, BYTES], ids=["trained", "bytes"])
@given(
    text=st.text("abé🙂\n", max_size=30),
    stop=st.lists(st.text("abé🙂\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=300)
def test_stop_strings_end_the_text_wherever_tokens_are_cut(words, text, stop):
    ids = words.encode(text).ids
    expected, ends, count = naive(words, ids, stop)
    out, stopped = pieces(words, ids, tuple(stop))
    assert ("".join(out), stopped, len(out) - 1) == (expected, ends, count)


@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_more_is_held_back_than_may_begin_a_stop_string(text, stop):
    stream, given_out = TextStream(BYTES, tuple(stop)), ""
    for count, token in enumerate(BYTES.encode(text).ids, 1):
        piece, stopped = stream.push(token)
        given_out += piece
        if stopped:
            return
        held = text[len(given_out) : count]
        assert given_out + held == text[:count]
        assert not held or any(one.startswith(held) and one != held for one in stop)


def test_without_stop_strings_each_character_comes_with_its_last_byte():
    text = "aé文🙂b"
    out, _ = pieces(BYTES, BYTES.encode(text).ids)
    sizes = [len(character.encode()) for character in text]
    assert out == [*itertools.chain(*([""] * (size - 1) + [c] for c, size in zip(text, sizes, strict=True))), ""]


def test_a_stop_string_across_three_tokens_and_what_begins_like_one():
    ids = [token for part in ("x E", "N", "D y EN", "D") for token in BYTES.encode(part).ids]
    assert pieces(BYTES, ids, ("END y END",)) == (["x", " ", *[""] * 9, ""], True)
    out, stopped = pieces(BYTES, BYTES.encode("x ENE").ids, ("END",))
    assert out == ["x", " ", "", "", "EN", "E"] and not stopped


def test_of_two_stop_strings_the_one_that_begins_first_counts():
    assert pieces(TRAINED, TRAINED.encode("self.weight").ids, ("weight", ".w", "t"))[1]
    for stop in (("weight", ".w"), (".w", "weight")):
        assert "".join(pieces(TRAINED, TRAINED.encode("self.weight").ids, stop)[0]) == "self"


def test_a_token_that_goes_on_after_the_stop_string_is_cut():
    ids = TRAINED.encode("return self").ids
    assert len(ids) < len("return self")
    assert "".join(pieces(TRAINED, ids, ("tur",))[0]) == "re"


def test_special_and_unknown_tokens_add_nothing():
    end = BYTES.token_to_id(tokenizer.END)
    ids = BYTES.encode("ab").ids
    assert "".join(pieces(BYTES, [end, ids[0], 9999, ids[1], end])[0]) == "ab"


@pytest.mark.parametrize("ids", [BYTES.encode("ab🙂").ids[:-1], BYTES.encode("ab" + CUT).ids], ids=["cut", "quoted"])
def test_a_text_that_ends_within_a_character_is_that_of_decode(ids):
    assert "".join(pieces(BYTES, ids)[0]) == BYTES.decode(ids)


@given(st.lists(st.integers(0, 256), max_size=30))
@example([157, 0, 0, 95])  # two bytes of a character that is cut, and end tokens between them
@settings(max_examples=300)
def test_bytes_that_are_no_text_come_out_as_decode_has_them(ids):
    """A model of random weights writes such bytes."""
    assert "".join(pieces(BYTES, ids)[0]) == BYTES.decode(ids)
