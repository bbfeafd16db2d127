"""The text of tokens as they come, as far as it is certain."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Turns tokens into text piece by piece, and ends it at a stop string.

    Held back are a character's bytes until its last one is there, and what may be the beginning of a stop string
    until it can't become one. A stop string is found across tokens, and is never part of the text. Of two that
    overlap the one that is complete first counts, so the text does not depend on how it is cut into tokens.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        """token_bytes: the UTF-8 bytes of a token. stop: strings, none of them empty."""
        self.stopped = False  # a stop string has come
        self._token_bytes, self._stop = token_bytes, tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # a stop string's beginning, so shorter than the longest

    def push(self, token: int) -> str:
        """The text that one more token makes certain."""
        return self._more(self._utf8.decode(self._token_bytes(token)))

    def close(self) -> str:
        """The rest, once nothing more comes; bytes that are no whole character become U+FFFD."""
        text = self._more(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _more(self, text: str) -> str:
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
