"""The front door: `load` turns a checkpoint folder into a `VLM`, which answers questions about pictures.

It joins the processor (messages to tokens) and the generator (tokens to tokens) and holds no arithmetic of its own.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from qwenvl_jax.checkpoints.adapter_bank import load_adapters
from qwenvl_jax.checkpoints.folder import GENERATION_CONFIG, locate, read_config, small_files
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.checkpoints.peft import load_adapter
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.inference.decode import Generator, bucket, length_bucket
from qwenvl_jax.inference.generate import Generation, pieces
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.inference.text import TextStream, token_bytes
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies
from qwenvl_jax.processing import boxes as box_drawing
from qwenvl_jax.processing.boxes import Box
from qwenvl_jax.processing.images import ImageSource, load_image, preprocess
from qwenvl_jax.processing.processor import MAX_WINDOW_SIZE, Processor
from qwenvl_jax.processing.template import Prompt

Messages = Sequence[Mapping[str, Any]]

MOST_ROWS = 32  # of a batch
MOST_TOKENS = 16384  # of a batch's prompts together, padding included: attention scores of a prefill grow with it
WINDOW = 256  # conversations of `batch` whose pictures are in memory at once
SMOOTH = 0.03  # seconds between two pieces of a stream, as far as the model is fast enough


@dataclasses.dataclass(frozen=True)
class Usage:
    """Numbers of tokens: of the prompt (pictures included), of the reply (the stop token included), of the pictures."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer. boxes: those in the text, in pixels of the latest picture. finish_reason: "stop" or "length"."""

    text: str
    boxes: list[Box]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    pictures: list[Image.Image] = dataclasses.field(repr=False)  # of the whole conversation, RGB

    def draw(self) -> Image.Image:
        """The latest picture with the boxes on it. Raises UserError when there is no picture."""
        if not self.pictures:
            raise UserError("there is no picture to draw on: the conversation has none")
        return box_drawing.draw(self.pictures[-1], self.boxes)


class VLM:
    """A model with its processor.

    Methods that generate take the fields of `SamplingOptions` as keywords; `defaults` holds what the checkpoint's
    generation_config.json says. Mistakes in what is given raise UserError. Threads may share a VLM.
    """

    def __init__(self, model: QwenVL, processor: Processor, generation_config: Mapping[str, Any] | None = None):
        settings = {"chat_format": "chatml"} | dict(generation_config or {})
        self.config: QwenVLConfig = model.config
        self.processor = processor
        self.generator = Generator(model)
        self.defaults = default_options(settings)
        self.is_chat = settings["chat_format"] == "chatml"
        # The released model keeps three quarters of its positions for system message and old turns.
        window = min(MAX_WINDOW_SIZE, self.config.max_position_embeddings * 3 // 4)
        self.max_window_size = min(settings.get("max_window_size", window), window)
        self._table = token_bytes(processor.tokenizer)

    def chat(self, messages: Messages, **options: Any) -> Reply:
        """The model's reply to a conversation that ends with a user message."""
        return self.replies([self._chat_prompt(messages)], self._options(options), self.chat_stop_ids, strip=True)[0]

    def stream(self, messages: Messages, **options: Any) -> Iterator[str]:
        """The text of the same reply in pieces, as they come."""
        prompt = self._chat_prompt(messages)
        generation, streams = self._start([prompt], self._options(options), self.chat_stop_ids, strip=True)
        return (texts[0] for texts in pieces(generation, streams, SMOOTH) if texts[0])

    def batch(self, conversations: Sequence[Messages], **options: Any) -> list[Reply]:
        """The replies to many conversations, in their order; each is the reply that `chat` gives."""
        chosen = self._options(options)
        replies: list[Reply] = []
        for start in range(0, len(conversations), WINDOW):
            prompts = []
            for number, messages in enumerate(conversations[start : start + WINDOW], start):
                try:
                    prompts.append(self._chat_prompt(messages))
                except UserError as error:
                    raise UserError(f"conversation {number}: {error}") from None
            replies += self.replies(prompts, chosen, self.chat_stop_ids, strip=True)
        return replies

    def generate(self, prompt: str, images: Sequence[ImageSource] = (), **options: Any) -> Reply:
        """The continuation of a raw prompt, for base models: no template, special tokens in the prompt count.

        Each `<img></img>` in it takes the next of `images`; without them the pictures come first.
        """
        read = self.processor.raw(prompt, images)
        return self.replies([read], self._options(options), self.raw_stop_ids, strip=False)[0]

    def score(
        self, prompt: str, choices: Sequence[str], images: Sequence[ImageSource] = (), *, per_token: bool = False
    ) -> np.ndarray:
        """float64 [choices]: log-likelihood of each choice as the continuation of a raw prompt (see `generate`).

        A choice is tokenised by itself and follows the prompt as it is: give it its leading blank. `per_token` divides
        by its number of tokens, so that long choices can be compared with short ones.
        """
        read = self.processor.raw(prompt, images)
        tokens = [self.processor.tokenizer.encode_ordinary(choice) for choice in choices]
        for number, ids in enumerate(tokens):
            if not ids:
                raise UserError(f"choices[{number}] is empty")
        features = self.generator.encode_images(read.pixels) if len(read.pixels) else None
        most = _rows_of_batch(len(read.input_ids) + max(map(len, tokens), default=0))
        scores = []
        for start in range(0, len(tokens), most):
            scores += self._score_rows(read, tokens[start : start + most], features)
        lengths = [len(ids) if per_token else 1 for ids in tokens]
        return np.array(scores, np.float64) / lengths

    def logits(
        self,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
        images: Sequence[ImageSource] = (),
        *,
        attention_mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 [B, T, V]: the logits after each token, from one pass over whole sequences.

        input_ids int [B, T] or [T]. Every image span in them takes the next picture, row after row. attention_mask
        [B, T], 0 at padding on either side, where logits mean nothing. As in the original, padding counts for positions
        and for the factor of dynamic NTK.
        """
        ids = np.atleast_2d(np.asarray(input_ids))
        if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"input_ids must be whole numbers [B, T], not {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UserError(f"input_ids must be 0 to {self.config.vocab_size - 1}, the model's vocabulary")
        mask = np.ones(ids.shape, bool) if attention_mask is None else np.atleast_2d(attention_mask).astype(bool)
        if mask.shape != ids.shape:
            raise UserError(f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}")
        rows, length = ids.shape
        batch = self.generator.batch(self._sequences(ids, images))
        valid = np.zeros(batch.ids.shape, bool)
        valid[:rows, :length] = mask
        rotary = frequencies(self.config, [length] * len(batch.ids))
        return np.asarray(self.generator.logits(batch, valid, rotary))[:rows, :length]

    def encode_image(self, image: ImageSource) -> np.ndarray:
        """float32 [Q, D]: the vectors that the language model sees of a picture."""
        pixels = preprocess([self.processor.load(image)], self.config.visual.image_size)
        return np.asarray(self.generator.encode_images(pixels)[0], np.float32)

    @functools.cached_property
    def raw_stop_ids(self) -> list[int]:
        """Tokens that end the continuation of a raw prompt."""
        return [self.processor.tokenizer.eod_id]

    @functools.cached_property
    def chat_stop_ids(self) -> list[int]:
        """Tokens that end a reply of `chat`."""
        tokenizer = self.processor.tokenizer
        return [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id]

    def _options(self, options: dict[str, Any]) -> SamplingOptions:
        return self.defaults.replace(options)

    def _chat_prompt(self, messages: Messages) -> Prompt:
        if not self.is_chat:
            raise UserError(
                "this is a base model (chat_format in generation_config.json is not chatml): it continues text and "
                "does not chat. Use generate(prompt, images=[...])"
            )
        return self.processor.chat(messages, self.max_window_size)

    def _start(
        self, prompts: Sequence[Prompt], options: SamplingOptions, stop_ids: list[int], *, strip: bool
    ) -> tuple[Generation, list[TextStream]]:
        streams = [
            TextStream(self._table, stop=options.stop, min_tokens=options.min_new_tokens, strip=strip) for _ in prompts
        ]
        return Generation(self.generator, prompts, [options] * len(prompts), stop_ids), streams

    def replies(
        self, prompts: Sequence[Prompt], options: SamplingOptions, stop_ids: list[int], *, strip: bool
    ) -> list[Reply]:
        """Replies in the order of the prompts; those of like length are generated together, best with one picture."""
        replies: dict[int, Reply] = {}
        for rows in _groups([len(prompt.input_ids) for prompt in prompts], [prompt.picture_keys for prompt in prompts]):
            generation, streams = self._start([prompts[row] for row in rows], options, stop_ids, strip=strip)
            texts = ["".join(parts) for parts in zip(*pieces(generation, streams), strict=True)]
            for place, row in enumerate(rows):
                count = streams[place].tokens if streams[place].stopped else int(generation.generated[place])
                replies[row] = self._reply(prompts[row], texts[place], generation.finish_reasons[place], count)
        return [replies[row] for row in range(len(prompts))]

    def _reply(self, prompt: Prompt, text: str, finish_reason: Literal["stop", "length"], tokens: int) -> Reply:
        image_tokens = len(prompt.pixels) * self.config.visual.n_queries
        usage = Usage(len(prompt.input_ids), tokens, image_tokens)
        boxes = self.processor.boxes(text, prompt.sources)
        return Reply(text, boxes, finish_reason, usage, prompt.sources)

    def _score_rows(self, prompt: Prompt, choices: list[list[int]], features: jax.Array | None) -> list[float]:
        """Summed log-likelihoods of tokenised choices after one prompt."""
        start = len(prompt.input_ids)
        if start == 0:
            raise UserError("the prompt is empty; give it at least one token")
        rows = [
            Prompt(
                np.concatenate([prompt.input_ids, np.array(ids, np.int32)]),
                np.concatenate([prompt.image_slots, np.full(len(ids), -1, np.int32)]),
                prompt.pixels,
                prompt.sources,
            )
            for ids in choices
        ]
        batch = self.generator.batch(rows, features=features)
        size = len(batch.ids), bucket(max(map(len, choices)), 8)
        positions, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
        for row, ids in enumerate(choices):
            positions[row, : len(ids)] = start - 1 + np.arange(len(ids))
            targets[row, : len(ids)] = ids
        scores = np.asarray(self.generator.score(batch, positions, targets), np.float64)
        return [float(scores[row, : len(ids)].sum()) for row, ids in enumerate(choices)]

    def _sequences(self, ids: np.ndarray, images: Sequence[ImageSource]) -> list[Prompt]:
        """Rows of ids as prompts, the pictures dealt out to the image spans in them."""
        visual = self.config.visual
        spans = [np.flatnonzero(row == visual.image_start_id) for row in ids]
        if sum(map(len, spans)) != len(images):
            raise UserError(f"input_ids have {sum(map(len, spans))} image spans, but {len(images)} images were given")
        left = iter(images)
        prompts = []
        for row, starts in enumerate(spans):
            slots = np.full(ids.shape[1], -1, np.int32)
            for number, start in enumerate(starts):
                end = start + 1 + visual.n_queries
                if end >= ids.shape[1] or ids[row, end] != visual.image_start_id + 1:
                    raise UserError(
                        f"input_ids, row {row}: the image span at {start} must hold exactly {visual.n_queries} ids "
                        f"between {visual.image_start_id} and {visual.image_start_id + 1}"
                    )
                slots[start + 1 : end] = number * visual.n_queries + np.arange(visual.n_queries)
            sources = [self.processor.load(next(left)) for _ in starts]
            prompts.append(Prompt(ids[row].astype(np.int32), slots, preprocess(sources, visual.image_size), sources))
        return prompts


def load(
    checkpoint: str | os.PathLike = "tiny",
    *,
    dtype: Any = None,
    quantize: str | None = None,
    mesh: Mesh | None = None,
    adapter: str | os.PathLike | None = None,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    allow_url: bool = False,
    image_mode: Literal["default", "reference"] = "default",
) -> VLM:
    """Loads a model.

    checkpoint: "tiny", which ships with the package, a folder in the Hugging Face layout, or a hub name.
    dtype: "float32", "bfloat16" or "float16"; by default as stored, and float32 on CPUs, which are slow at the others.
    quantize: "int8", "int4" or "nf4" keeps the language model's weights in 8 or 4 bits (docs/quantisation.md); a
    folder that is quantised (GPTQ) is recognised without.
    mesh: devices over which the parameters are split (see sharding.py); by default one.
    adapter: a folder in PEFT's format whose adapter is active, unmerged; see checkpoints/peft.py.
    adapters: such folders by name, from which each request to an engine chooses (inference/requests.py); all else that
    a VLM does is the base model's.
    allow_url: whether messages may name pictures by http(s) URL.
    image_mode: "reference" reads pictures exactly as the original does, which ignores EXIF and drops transparency.
    Raises UserError when there is no such checkpoint or its files do not belong together.
    """
    if image_mode not in ("default", "reference"):
        raise UserError(f"image_mode {image_mode!r} is neither 'default' nor 'reference'")
    _keep_compiled_programs()
    folder = locate(os.fspath(checkpoint))
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if dtype is None:
        dtype = "float32" if platform == "cpu" else None
    elif not isinstance(dtype, str):
        dtype = jnp.dtype(dtype).name
    loader = functools.partial(load_image, allow_url=allow_url, mode=image_mode)
    processor = Processor.from_folder(folder, read_config(folder), load=loader)
    model = load_model(folder, dtype=dtype, mesh=mesh, quantize=quantize)
    if adapter is not None:
        model = load_adapter(model, os.fspath(adapter), mesh=mesh)
    model = load_adapters(model, adapters or {}, mesh=mesh)
    try:
        return VLM(
            model, processor, small_files(folder, None if adapter is None else os.fspath(adapter))["generation_config"]
        )
    except UserError as error:
        raise UserError(f"{folder / GENERATION_CONFIG}: {error}") from None


def default_options(settings: Mapping[str, Any]) -> SamplingOptions:
    """Sampling options from the keys of a generation_config.json. Raises UserError naming the key that is wrong."""
    names = ("top_p", "top_k", "repetition_penalty", "max_new_tokens", "min_new_tokens")
    chosen = {name: settings[name] for name in names if settings.get(name) is not None}
    temperature = settings.get("temperature") or 1.0
    return SamplingOptions(temperature=temperature if settings.get("do_sample") else 0.0, **chosen)


def _rows_of_batch(length: int) -> int:
    """How many prompts of this length are computed together."""
    return max(1, min(MOST_ROWS, MOST_TOKENS // length_bucket(length)))


def _groups(lengths: Sequence[int], pictures: Sequence[tuple[bytes, ...]]) -> list[list[int]]:
    """Numbers of prompts that make a batch: prompts of one bucket, as many as fit, those with the same pictures one
    after another."""
    groups: list[list[int]] = []
    first: dict[tuple[bytes, ...], int] = {}
    for row, keys in enumerate(pictures):
        first.setdefault(keys, row)
    order = [(length_bucket(lengths[row]), first[keys], lengths[row], row) for row, keys in enumerate(pictures)]
    for *_, row in sorted(order):
        last = groups[-1] if groups else []
        same_bucket = last and length_bucket(lengths[last[0]]) == length_bucket(lengths[row])
        if same_bucket and len(last) < _rows_of_batch(lengths[row]):
            last.append(row)
        else:
            groups.append([row])
    return groups


def _keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs on disk between runs, unless the user has said where or that it should not."""
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # set when jax is imported
    if chosen is not None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "qwenvl-jax" / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
