"""Replies of a model that was offered tools, as OpenAI's tool calls or the older function calls."""

from collections import defaultdict
from typing import Any

from qwenvl_jax.serving import react
from qwenvl_jax.serving.answer import Piece
from qwenvl_jax.serving.chunks import ChoiceForm

Json = dict[str, Any]


class ToolForm:
    """Writes what `react.parsed` finds in a reply, in the head and opening of `form`. A stream of it has one chunk.

    begun: what the prompt has of the reply. older: `function_call` in place of `tool_calls`. No log-probabilities are
    sent, since the tokens are not those of the content.
    """

    def __init__(self, form: ChoiceForm, begun: str, older: bool):
        self.head, self.name, self.opening = form.head, form.name, form.opening
        self._begun, self._older = begun, older
        self._texts: defaultdict[int, str] = defaultdict(str)

    def chunk(self, piece: Piece) -> Json | None:
        """Nothing before the end, since only then it is known what is content and what a call."""
        self._texts[piece.index] += piece.text
        if piece.finish_reason is None:
            return None
        message, reason = self._parsed(self._texts.pop(piece.index), piece.finish_reason)
        for number, call in enumerate(message.get("tool_calls", ())):
            call["index"] = number
        return {"index": piece.index, "delta": message, "logprobs": None, "finish_reason": reason}

    def whole(self, piece: Piece) -> Json:
        assert piece.finish_reason is not None
        message, reason = self._parsed(piece.text, piece.finish_reason)
        message = {"role": "assistant", "refusal": None} | message
        return {"index": piece.index, "message": message, "logprobs": None, "finish_reason": reason}

    def _parsed(self, text: str, finish_reason: str) -> tuple[Json, str]:
        """Content and calls, and why it ended. A call that is cut off by its length is one all the same."""
        content, call = react.parsed(text, self._begun)
        if call is None:
            return {"content": content}, finish_reason
        function = {"name": call.name, "arguments": call.arguments}
        if self._older:
            return {"content": content, "function_call": function}, "function_call"
        calls = [{"id": react.new_id(), "type": "function", "function": function}]
        return {"content": content or None, "tool_calls": calls}, "tool_calls"
