"""An OpenAI server that answers samples: this project's, vLLM's, a provider's. It chats, and ranks no choices."""

import base64
import io
import mimetypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.runner import Answer, Lost
from qwenvl_jax.evaluation.task import PICTURE, Decoding, Sample

TRIES = 6  # of a request, where the server is busy; the waits double from a second on
SECONDS = 600.0  # for an answer
SECONDS_TO_LIST = 30.0


class ServedModel:
    """base: as `http://127.0.0.1:8000/v1`. name: the model there; by default the first that it lists.

    key: of the API, by default the variable OPENAI_API_KEY. Raises UserError where no server answers, or where it does
    not take the key.
    """

    def __init__(
        self, base: str, decoding: Decoding, name: str | None = None, key: str | None = None, at_once: int = 32
    ):
        self.decoding, self.at_once, self.together = decoding, at_once, 1
        self._client = openai_client(base, key)
        self.name = self._checked(name)

    def _checked(self, name: str | None) -> str:
        """The model's name, from a server that is there and takes the key: else every sample would find that out."""
        import openai

        base = self._client.base_url
        try:
            listed = self._client.with_options(max_retries=1, timeout=SECONDS_TO_LIST).models.list()
            return name or listed.data[0].id
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{base}: the server does not take this key ({said(error)})") from None
        except openai.NotFoundError as error:
            if name:  # there are servers without a list
                return name
            raise UserError(f"{base}: there is no list of models ({said(error)}); does it end in /v1?") from None
        except (openai.APIError, IndexError, AttributeError, TypeError) as error:
            raise UserError(f"{base}: no list of models came ({said(error)}); is a server there?") from None

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises UserError for samples whose choices are to be ranked."""
        if any(sample.choices for sample in samples):
            raise UserError("a server ranks no choices: use --generate, which has the answer written")

    def length(self, sample: Sample) -> int:
        return len(sample.prompt)

    def answers(self, samples: Sequence[Sample]) -> list[Answer | UserError]:
        """Raises Lost where the server does not answer."""
        found: list[Answer | UserError] = []
        for sample in samples:
            try:
                found.append(self._answer(sample))
            except UserError as error:
                found.append(error)
        return found

    def _answer(self, sample: Sample) -> Answer:
        import openai

        try:
            reply = self._client.chat.completions.create(
                model=self.name,
                messages=[{"role": "user", "content": parts(sample)}],
                max_tokens=self.decoding.max_new_tokens,
                temperature=self.decoding.temperature,
                top_p=self.decoding.top_p,
            )
        except (
            openai.BadRequestError,
            openai.UnprocessableEntityError,
            openai.ContentFilterFinishReasonError,
        ) as error:
            raise UserError(f"the server refused it: {said(error)}") from None
        except openai.APIError as error:
            raise Lost(f"{self._client.base_url}: {said(error)}") from None
        if not reply.choices:
            raise UserError("the server's reply has no choices")
        choice, usage = reply.choices[0], reply.usage
        return Answer(
            (choice.message.content or "").strip(),
            finish_reason=choice.finish_reason,
            tokens=usage.completion_tokens if usage else 0,
        )

    def __enter__(self) -> "ServedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


def said(error: Exception) -> str:
    """What a server said of an error, in one line."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error).split())[:500] or type(error).__name__


def openai_client(base: str, key: str | None) -> Any:
    """A client. Raises UserError where the package is missing."""
    try:
        import openai
    except ImportError:
        raise UserError('--api-base needs the package openai: pip install "qwenvl-jax[eval]"') from None
    key = key or os.environ.get("OPENAI_API_KEY") or "none"
    return openai.OpenAI(base_url=base, api_key=key, max_retries=TRIES, timeout=SECONDS)


def parts(sample: Sample) -> list[dict[str, Any]]:
    """The content of a user's message, pictures as data URIs. Raises UserError for a picture that is none."""
    found: list[dict[str, Any]] = []
    texts = sample.prompt.split(PICTURE)
    if len(texts) - 1 != len(sample.pictures):
        raise UserError(f"the prompt has {len(texts) - 1} places for {len(sample.pictures)} pictures")
    for number, text in enumerate(texts):
        if number:
            found.append({"type": "image_url", "image_url": {"url": data_uri(sample.pictures[number - 1])}})
        if text.strip():
            found.append({"type": "text", "text": text.strip()})
    return found


def data_uri(picture: Path | bytes) -> str:
    """A picture as it is, if it is one. Raises UserError."""
    try:
        content = picture if isinstance(picture, bytes) else picture.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            kind = mimetypes.types_map.get(f".{(image.format or '').lower()}", "image/png")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{picture if isinstance(picture, Path) else 'a picture'}: {error}") from None
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
