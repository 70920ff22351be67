"""Text from tokens that arrive one by one: characters and stop strings may be spread over tokens in any way."""

import itertools
import random

import pytest

from lm.generate.stopping import Detokenizer, Row, held_back


def decode_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


WORDS = ["a", "b", "ab", "END", "EN", "D", " ", "DE", "E", "N"]


def decode_words(ids):
    """Like SentencePiece: the space at the start of the text is dropped."""
    return "".join(WORDS[i] for i in ids).removeprefix(" ")


@pytest.mark.parametrize("text", ["plain", "naïve – 東京 🙂 done", "🙂🙂", "\N{REPLACEMENT CHARACTER}x"])
def test_pieces_of_bytes_join_to_the_text_and_are_never_half_a_character(text):
    stream = Detokenizer(decode_bytes, [65, 66])
    pieces = [stream.add(token) for token in text.encode()]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + stream.rest() == text


def test_bytes_that_are_no_text_come_out_as_replacement_characters_and_lose_nothing_after():
    ids = [0xFF, 0xFF, ord("a"), 0xC3, ord("b"), 0xE2, 0x82]
    stream = Detokenizer(decode_bytes, [])
    assert "".join(stream.add(i) for i in ids) + stream.rest() == decode_bytes(ids)


def test_a_character_begun_by_the_prompt_does_not_disturb_what_follows():
    stream = Detokenizer(decode_bytes, [65, 0xC3])
    assert "".join(stream.add(i) for i in b"\xa9tude") + stream.rest() == "tude"


def test_a_space_after_the_prompt_is_kept():
    stream = Detokenizer(decode_words, [0])
    assert [stream.add(6), stream.add(1)] == [" ", "b"]


def test_each_token_is_decoded_a_bounded_number_of_times():
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return decode_bytes(ids)

    stream = Detokenizer(decode, list(range(65, 90)) * 20)
    for token in ("word and é " * 100).encode():
        stream.add(token)
    assert max(sizes) <= 12


def naive(words, stops):
    """(text, number of tokens) by decoding everything after every token."""
    for n in range(1, len(words) + 1):
        text = "".join(WORDS[i] for i in words[:n])
        found = [i for stop in stops if (i := text.find(stop)) >= 0]
        if found:
            return text[:min(found)], n
    return "".join(WORDS[i] for i in words), len(words)


@pytest.mark.parametrize("stops", [("END",), ("END", "b"), ("abab", "DD"), (" E", "aEND")])
def test_stop_strings_are_found_however_they_are_spread(stops):
    rng = random.Random(0)
    stopped = 0
    for _ in range(300):
        words = [rng.randrange(len(WORDS)) for _ in range(12)]
        row = Row([0], decode_words, (), stops)
        shown = ""
        for word in words:
            row.add(word)
            shown += row.piece()
        row.finish("length")
        shown += row.piece()
        text, count = naive(words, stops)
        out = row.result()
        assert (out.text, len(out.tokens), shown) == (text, count, text)
        assert (out.finish_reason == "stop") == (text != "".join(WORDS[i] for i in words))
        stopped += out.finish_reason == "stop"
    assert 0 < stopped < 300


def test_what_may_become_a_stop_string_is_not_shown():
    row = Row([0], decode_words, (), ("aEND",))
    shown = []
    for word in (1, 0, 4, 5):  # b a EN D
        row.add(word)
        shown.append(row.piece())
    assert shown == ["b", "", "", ""] and row.reason == "stop" and row.result().text == "b"


def test_held_back_is_the_longest_end_that_begins_a_stop_string():
    for letters in itertools.product("ab", repeat=5):
        text, stops = "".join(letters), ("abb", "ba")
        expected = max([n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])])
        assert held_back(text, stops) == expected


def test_a_stop_token_ends_the_row_and_is_a_token_but_no_text():
    row = Row([0], decode_words, (6,), ())
    for word in (1, 6, 1):
        row.add(word)
    out = row.result()
    assert (out.tokens.tolist(), out.text, out.finish_reason) == ([1, 6], "b", "eos")


def test_a_stop_string_that_waits_for_half_a_character_is_found_at_the_end():
    row = Row([65], decode_bytes, (), ("\N{REPLACEMENT CHARACTER}",))
    for token in (66, 0xC3):
        row.add(token)
    row.finish("length")
    assert (row.result().text, row.result().finish_reason) == ("B", "stop")
