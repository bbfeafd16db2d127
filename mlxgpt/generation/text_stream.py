"""From tokens to text, one token at a time, with stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Turns tokens into text piece by piece, and ends the text at a stop string.

    It holds back the bytes of a character until the last one has come, and what may be the beginning of a stop string
    until it can't become one. A stop string may extend over several tokens, and is never part of the text. If two
    overlap, the one that is complete first counts, so the text does not depend on how it is cut into tokens.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        """token_bytes: the UTF-8 bytes of a token. stop: strings, none of them empty."""
        self.stopped = False  # whether a stop string has come
        self._token_bytes, self._stop = token_bytes, tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # what may be the beginning of a stop string, shorter than the longest one

    def push(self, token: int) -> str:
        """Adds a token -> the text that is certain now and was not before."""
        return self._add(self._utf8.decode(self._token_bytes(token)))

    def close(self) -> str:
        """Ends the tokens -> the text held back. Bytes that are not a whole character become U+FFFD."""
        text = self._add(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _add(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        if self.stopped:
            return ""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                self._held = text[-n:]
                return text[:-n]
        return text
