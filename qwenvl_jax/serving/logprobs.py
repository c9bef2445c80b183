"""Log-probabilities in the two forms of OpenAI's API, and what a token looks like in them."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from qwenvl_jax.inference.requests import TokenChoice
from qwenvl_jax.processing.tokenizer import Tokenizer

LEAST = -9999.0  # stands for minus infinity, which JSON cannot say


class TokenTexts:
    """The bytes and the text of every token: special tokens by their names, rows without a meaning by their ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._bytes = {rank: token for token, rank in tokenizer.ranks.items()}
        self.longest = max(map(len, self._bytes.values()))  # bytes of an ordinary token
        self._bytes |= {rank: name.encode() for name, rank in tokenizer.special_tokens.items()}
        self._shown = {rank: token for rank, token in self._bytes.items() if rank < tokenizer.eod_id}
        self._shown |= {rank: self._bytes[rank] for rank in tokenizer.grounding_ids}

    def whole(self, token: int) -> bytes:
        return self._bytes.get(token, b"")

    def shown(self, token: int) -> bytes:
        """The bytes that the token adds to a reply."""
        return self._shown.get(token, b"")

    def text(self, token: int) -> str:
        found = self._bytes.get(token)
        return f"token_id:{token}" if found is None else found.decode("utf-8", "replace")

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens side by side."""
        return b"".join(map(self.whole, tokens)).decode("utf-8", "replace")


class Aligner:
    """Cuts the text of one reply into the texts of its tokens, which joined are the reply.

    A character of several tokens belongs to the last of them. What is no part of the reply, such as blanks at its ends
    and what follows a stop string in the same token, is no part of a token's text; its bytes are whole all the same.
    """

    def __init__(self, texts: TokenTexts):
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""  # text of the reply that no token has got yet

    def split(self, text: str, choices: Sequence[TokenChoice]) -> list[str]:
        """The texts of the next tokens; `text`: what the reply has grown by."""
        self._rest += text
        pieces = []
        for choice in choices:
            piece = self._decoder.decode(self._texts.shown(choice.token))
            while piece and not self._rest.startswith(piece):
                # Blanks that were left out at the start, or an end that was.
                piece = piece[1:] if piece[0].isspace() and not self._rest.startswith(piece[0]) else piece[:-1]
            self._rest = self._rest[len(piece) :]
            pieces.append(piece)
        return pieces


def chat_logprobs(texts: TokenTexts, pieces: Sequence[str], choices: Sequence[TokenChoice]) -> dict[str, Any]:
    """`logprobs` of a choice of chat.completion or of a chunk."""
    content = [
        _entry(texts, choice.token, choice.logprob, piece)
        | {"top_logprobs": [_entry(texts, token, logprob) for token, logprob in choice.alternatives]}
        for piece, choice in zip(pieces, choices, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    texts: TokenTexts, pieces: Sequence[str], choices: Sequence[TokenChoice], offset: int
) -> dict[str, Any]:
    """`logprobs` of a choice of text_completion; offset: characters of the reply before these tokens."""
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    return {
        "tokens": list(pieces),
        "token_logprobs": [_finite(choice.logprob) for choice in choices],
        "top_logprobs": [_by_text(texts, choice) for choice in choices],
        "text_offset": offsets,
    }


def _by_text(texts: TokenTexts, choice: TokenChoice) -> dict[str, float]:
    """Of tokens with the same text the most likely one stays."""
    return {texts.text(token): _finite(logprob) for token, logprob in reversed(choice.alternatives)}


def _entry(texts: TokenTexts, token: int, logprob: float, piece: str | None = None) -> dict[str, Any]:
    """piece: the text of a token of the reply; special tokens that were not chosen go by their names."""
    text, content = (texts.text(token), texts.whole(token)) if piece is None else (piece, texts.shown(token))
    return {"token": text, "logprob": _finite(logprob), "bytes": list(content)}


def _finite(logprob: float) -> float:
    """Not above 0, where rounding may put it, and a number."""
    return min(logprob, 0.0) if logprob > LEAST else LEAST
