"""Tokens to text while they come: no broken character, no part of a stop string ever leaves a stream.

What the tokens mean is the tokenizer's; when to ask the model for more is `generate.py`'s.
"""

import codecs
from collections.abc import Mapping, Sequence

from qwenvl_jax.processing.tokenizer import GROUNDING_TAGS, Tokenizer


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes that each token adds to a reply: ordinary tokens and the tags of ref, box and quad; others add none."""
    table = {rank: token for token, rank in tokenizer.ranks.items()}
    return table | {tokenizer.special_tokens[tag]: tag.encode() for tag in GROUNDING_TAGS}


class TextStream:
    """The text of one reply, fed token by token.

    `stop`: strings that end the reply; they count from `min_tokens` tokens on. `strip` leaves out blanks at both ends.
    """

    def __init__(
        self, table: Mapping[int, bytes], *, stop: Sequence[str] = (), min_tokens: int = 0, strip: bool = False
    ):
        self.stopped = False  # a stop string was found; what is fed after it is ignored
        self.tokens = 0  # fed until then
        self.decoded = 0  # characters that came of them
        self.certain = 0  # of these, how many are decided on, whether they were shown or left out as blanks in front
        self.skipped = 0  # of these, the blanks in front
        self._table = table
        self._stop = stop
        self._min_tokens = min_tokens
        self._strip = strip
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that may turn out to be part of a stop string or a blank at the end
        self._at_start = True

    @property
    def has_stop(self) -> bool:
        """Whether there are stop strings to look for."""
        return bool(self._stop)

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that is certain once these tokens are there."""
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            pieces.append(self._add(self._decoder.decode(self._table.get(token, b""))))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text, after the last token; an unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._add(self._decoder.decode(b"", final=True))
        return text + self._cut(len(self._held))

    def _add(self, text: str) -> str:
        self._held += text
        self.decoded += len(text)
        if self.tokens >= self._min_tokens:
            found = [start for start in map(self._held.find, self._stop) if start >= 0]
            if found:
                self.stopped = True
                return self._cut(min(found))
        return self._release(len(self._held) - self._may_stop())

    def _cut(self, length: int) -> str:
        """Ends the text after so many characters of what is held."""
        text = self._release(length)
        self._held = ""
        return text

    def _release(self, length: int) -> str:
        """So many characters of what is held, without the blanks at the end that may be those of the whole text."""
        certain = self._held[:length]
        if self._strip:
            certain = certain.rstrip()
        self._held = self._held[len(certain) :]
        self.certain += len(certain)
        return self._shown(certain)

    def _may_stop(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _shown(self, text: str) -> str:
        if self._strip and self._at_start:
            shown = text.lstrip()
            self.skipped += len(text) - len(shown)
            text = shown
        self._at_start = self._at_start and not text
        return text
