"""TextStream: characters and stop strings that extend over several tokens."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.generation.text_stream import TextStream


def run(parts: list[bytes], *stop: str) -> tuple[list[str], TextStream]:
    """The text that each part adds, with the rest at the end, and the stream."""
    stream = TextStream(parts.__getitem__, stop)
    pieces = []
    for token in range(len(parts)):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.close()], stream


def naive(text: str, stops: list[str]) -> str:
    """The text up to the stop string that is complete first; of several complete at once, the longest."""
    for end in range(1, len(text) + 1):
        if hits := [len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(hits)]
    return text


@settings(deadline=None, derandomize=True)
@given(
    text=st.text("abé", max_size=25),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=12),
)
def test_the_text_does_not_depend_on_where_tokens_begin(text, stops, cuts):
    content = text.encode()
    at = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    pieces, stream = run([content[a:b] for a, b in itertools.pairwise(at)], *stops)
    assert "".join(pieces) == naive(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


def test_a_character_waits_for_its_last_byte():
    pieces, _ = run([b"a", b"\xf0\x9f", b"\x98", b"\x80", b"b"])
    assert pieces == ["a", "", "", "😀", "b", ""]


def test_invalid_bytes_become_replacement_characters():
    assert run([b"\xff", b"a", b"\xe2\x82"])[0] == ["\ufffd", "a", "", "\ufffd"]


def test_the_beginning_of_a_stop_string_is_held_back():
    pieces, stream = run([b"a\n", b"\n", b"x\n", b"\n#", b"more"], "\n\n#")
    assert pieces == ["a", "", "\n\nx", "", ""]
    assert stream.stopped
    assert stream.push(4) == ""
    pieces, stream = run([b"a\n", b"\n"], "\n\n#")
    assert pieces == ["a", "", "\n\n"]
    assert not stream.stopped


def test_text_before_a_possible_stop_string_is_not_held_back():
    pieces, _ = run([b"abc", b"abx"], "abcd", "bx!")
    assert pieces == ["", "abca", "bx"]


@pytest.mark.parametrize("stop", ["\n\n", "ab" * 10 + "c"])
def test_a_token_takes_no_longer_in_a_long_text(stop):
    stream = TextStream(lambda token: b"ab", (stop,))

    def seconds(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            stream.push(0)
        return time.perf_counter() - start

    first = min(seconds(1000) for _ in range(3))
    seconds(50_000)
    assert min(seconds(1000) for _ in range(3)) < 5 * first
