"""The processor of Qwen-VL: messages or a raw prompt to a `Prompt`, training labels, replies to text and boxes.

It joins the tokenizer, the pictures and the ChatML template, and holds no model. The original's own string forms are
in `legacy.py`.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.processing import boxes, template
from qwenvl_jax.processing.boxes import Box
from qwenvl_jax.processing.image_errors import ImageError
from qwenvl_jax.processing.images import load_image, preprocess
from qwenvl_jax.processing.messages import BoxPart, Message, Picture, Ref, Text, read_messages
from qwenvl_jax.processing.template import Piece, Prompt, Segment
from qwenvl_jax.processing.tokenizer import Tokenizer

VOCABULARY_FILE = "qwen.tiktoken"
MAX_WINDOW_SIZE = 6144  # ids, from the released generation_config.json
_SPAN = re.compile(r"<img>.*?</img>", re.DOTALL)


class Processor:
    """Makes prompts for one model.

    `load` turns the `image` or `url` of a message part into an RGB picture. The default reads files and data and
    fetches no URL; a server passes a stricter one, since a part may name any file. `training_form`: how `training`
    writes conversations, in ChatML or, for the pre-training of base models, "raw". Raises UserError when the vocabulary
    and the configuration do not belong together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: QwenVLConfig,
        *,
        load: Callable[[Any], Image.Image] = load_image,
        training_form: Literal["chat", "raw"] = "chat",
    ):
        if tokenizer.image_start_id != config.visual.image_start_id:
            raise UserError(
                f"the vocabulary places <img> at id {tokenizer.image_start_id}, config.json (visual.image_start_id) at "
                f"{config.visual.image_start_id}; they belong to different checkpoints"
            )
        if tokenizer.n_queries != config.visual.n_queries:
            raise UserError(
                f"the tokenizer makes {tokenizer.n_queries} ids of a picture, config.json (visual.n_queries) says "
                f"{config.visual.n_queries}"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.load = load
        self.training_form = training_form

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike, config: QwenVLConfig, *, load: Callable[[Any], Image.Image] = load_image
    ) -> "Processor":
        """The processor of a checkpoint folder, which holds `qwen.tiktoken`. Raises UserError naming the file."""
        tokenizer = Tokenizer.from_file(Path(folder) / VOCABULARY_FILE, config.visual.n_queries)
        return cls(tokenizer, config, load=load)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], max_window_size: int = MAX_WINDOW_SIZE, begun: str = ""
    ) -> Prompt:
        """The prompt for the next reply in a conversation; it ends with the assistant's header, and `begun` after it.

        Old turns (a user message and its reply) are left out, oldest first, where system message and turns would
        reach `max_window_size` ids; the last message always stays whole and is not counted. Pictures keep the number
        that they have in the whole conversation. Raises UserError that names the message, part and field.
        """
        read, pictures = read_messages(messages, self.load, last_role="user")
        system, turns = self._split_system(read)
        newline = template.newline(self.tokenizer)
        start = template.block(self.tokenizer, "system", system)
        blocks = [newline + self._block(message) for message in turns]
        history = [user + assistant for user, assistant in zip(blocks[:-1:2], blocks[1::2], strict=True)]
        kept = template.newest_within([len(turn) for turn in history], len(start), max_window_size)
        dropped = sum(message.pictures for message in turns[: 2 * (len(history) - kept)])
        body = _joined([start, *history[len(history) - kept :], blocks[-1], newline])
        reply = template.segment(self.tokenizer, template.reply_pieces(self.tokenizer, begun))
        return self._prompt(body + template.header(self.tokenizer, "assistant") + reply, pictures, dropped)

    def training(self, messages: Sequence[Mapping[str, Any]], answers_only: bool = False) -> tuple[Prompt, np.ndarray]:
        """A whole conversation, ending in an assistant message, and its labels int32 [T].

        Labels stand at the positions of their tokens (not shifted) and are -100 where nothing is learnt; which those
        are says `template.training_labels`. Nothing is truncated. Raises UserError as `chat` does.
        """
        body, labels, pictures = self.training_tokens(messages, answers_only)
        return self._prompt(body, pictures, dropped=0), labels

    def training_tokens(
        self, messages: Sequence[Mapping[str, Any]], answers_only: bool = False
    ) -> tuple[Segment, np.ndarray, list[Image.Image]]:
        """What `training` gives, before the pictures are resized: tokens, labels int32 [T] and RGB pictures."""
        read, pictures = read_messages(messages, self.load, last_role="assistant")
        if self.training_form == "raw":
            return *self._raw_training(read), pictures
        system, turns = self._split_system(read)
        contents = [("system", system), *((message.role, self._content(message)) for message in turns)]
        newline = template.newline(self.tokenizer)
        body = _joined([template.block(self.tokenizer, role, content) + newline for role, content in contents])
        labels: list[int] = []
        for role, content in contents:
            labels += template.training_labels(self.tokenizer, role, content, answers_only)
        return body, np.array(labels, np.int32), pictures

    def _raw_training(self, read: Sequence[Message]) -> tuple[Segment, np.ndarray]:
        """Tokens and labels without ChatML: contents one after another, `<|endoftext|>` after each answer.

        Answers and what ends them are learnt (Qwen-VL paper, appendix B).
        """
        parts: list[Segment] = []
        labels: list[int] = []
        for message in read:
            part = self._content(message, numbered=False)
            if message.role == "assistant":
                part += template.plain([self.tokenizer.eod_id])
            parts.append(part)
            labels += part.ids if message.role == "assistant" else [template.IGNORED] * len(part)
        return _joined(parts), np.array(labels, np.int32)

    def answered_tokens(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Segment, Segment, list[Image.Image]]:
        """A whole conversation in two parts, before the last answer and that answer with what closes it, and pictures.

        The tokens are those of `training_tokens` in ChatML, but for the last line break. Raises UserError as `chat`.
        """
        read, pictures = read_messages(messages, self.load, last_role="assistant")
        system, turns = self._split_system(read)
        newline = template.newline(self.tokenizer)
        blocks = [template.block(self.tokenizer, "system", system), *map(self._block, turns[:-1])]
        prompt = _joined([block + newline for block in blocks]) + template.header(self.tokenizer, "assistant")
        return prompt, self._closed(self._content(turns[-1])), pictures

    def answer_tokens(self, text: str) -> Segment:
        """The tokens of an assistant's text with what closes it, as at the end of `answered_tokens`."""
        return self._closed(template.segment(self.tokenizer, template.reply_pieces(self.tokenizer, text)))

    def raw(self, text: str, images: Sequence[Any] = ()) -> Prompt:
        """A prompt as the developer wrote it, for base models: no template, and every special token in it counts.

        Each `<img>...</img>` takes the next of `images` (sources as for a message part); what stands inside is
        ignored and never opened. Without such spans the pictures come first. Raises UserError when their numbers
        differ.
        """
        pictures = [self._load_raw(source, number) for number, source in enumerate(images)]
        texts = _SPAN.split(text)
        if len(texts) == 1:
            texts = [""] * len(pictures) + texts
        if len(texts) - 1 != len(pictures):
            raise UserError(
                f"the prompt has {len(texts) - 1} <img>...</img> spans, but {len(pictures)} images were given"
            )
        parts = [template.plain(self.tokenizer.encode(texts[0]))]
        for row, following in enumerate(texts[1:]):
            parts.append(template.segment(self.tokenizer, template.span_pieces(self.tokenizer, row)))
            parts.append(template.plain(self.tokenizer.encode(following)))
        return self._prompt(_joined(parts), pictures, dropped=0)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of generated ids: the tags of ref, box and quad stay, all other special tokens are dropped.

        Any ids are fine, unused rows of the embedding and unclosed image tags included. `errors="ignore"` holds back
        the bytes of an unfinished character, for streaming.
        """
        known = (int(token) for token in ids)
        kept = [token for token in known if token < self.tokenizer.eod_id or token in self.tokenizer.grounding_ids]
        return self.tokenizer.decode(kept, errors=errors)

    def boxes(self, text: str, sources: Sequence[Image.Image]) -> list[Box]:
        """The boxes in a reply, in pixels of the latest picture, which is the one the model refers to."""
        if not sources:
            return []
        return boxes.parse(text, sources[-1].size, len(sources) - 1)

    def _split_system(self, messages: list[Message]) -> tuple[Segment, list[Message]]:
        """The content of the system block, the default one where there is none, and the messages after it."""
        if messages[0].role == "system":
            return self._content(messages[0]), messages[1:]
        return template.segment(self.tokenizer, [template.DEFAULT_SYSTEM]), messages

    def _block(self, message: Message) -> Segment:
        return template.block(self.tokenizer, message.role, self._content(message))

    def _closed(self, content: Segment) -> Segment:
        return content + template.plain([self.tokenizer.im_end_id])

    def _content(self, message: Message, numbered: bool = True) -> Segment:
        """A message's tokens. numbered: pictures as "Picture N:", a span and a line break; else bare spans."""
        pieces: list[Piece] = []
        for part in message.parts:
            match part:
                case Text(text) if message.role == "assistant":
                    pieces += template.reply_pieces(self.tokenizer, text)
                case Text(text):
                    pieces.append(text)
                case Picture(index) if not numbered:
                    pieces += template.span_pieces(self.tokenizer, index)
                case Picture(index):
                    pieces += template.picture_pieces(self.tokenizer, index, index + 1)
                case Ref(label):
                    pieces += template.ref_pieces(self.tokenizer, label)
                case BoxPart(corners, label, size):
                    pieces += template.box_pieces(self.tokenizer, label, corners, size)
        return template.segment(self.tokenizer, pieces)

    def _prompt(self, body: Segment, pictures: list[Image.Image], dropped: int) -> Prompt:
        """Arrays of `body`, without the first `dropped` pictures."""
        ids, slots = body.arrays()
        slots = np.where(slots < 0, slots, slots - dropped * self.tokenizer.n_queries)
        return Prompt(ids, slots, preprocess(pictures[dropped:], self.config.visual.image_size), pictures)

    def _load_raw(self, source: Any, number: int) -> Image.Image:
        try:
            return self.load(source)
        except ImageError as error:
            raise error.at(f"images[{number}]") from None
        except UserError as error:
            raise UserError(f"images[{number}]: {error}") from None


def _joined(segments: Sequence[Segment]) -> Segment:
    return functools.reduce(Segment.__add__, segments)
