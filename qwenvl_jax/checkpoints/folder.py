"""A checkpoint folder apart from its weights: finding it by name, its small files, and writing one all or nothing."""

import difflib
import importlib.resources
import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from qwenvl_jax.checkpoints.tensor_files import FolderTensors, read_json
from qwenvl_jax.config import QwenVLConfig, UserError

VOCABULARY = "qwen.tiktoken"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
QUANTIZATION_CONFIG = "quantization_config"  # a key of config.json
QUANTIZE_CONFIG = "quantize_config.json"  # the same in a file of its own, AutoGPTQ's first way


class SmallFiles(TypedDict):
    """What a folder holds besides config.json and weights, None for what it lacks; arguments of `save_model`."""

    tokenizer_file: Path | None
    tokenizer_config: Mapping[str, Any] | None
    generation_config: Mapping[str, Any] | None


def locate(checkpoint: str | Path) -> Path:
    """The folder that a user means: "tiny" (ships with the package), a path, or a hub name such as "Qwen/Qwen-VL-Chat".

    A hub name is looked up in the local cache first and downloaded if it is not there. Raises UserError, with similar
    names where there are any.
    """
    if str(checkpoint) == "tiny":
        folder = Path(str(importlib.resources.files("qwenvl_jax"))) / "assets" / "tiny"
    else:
        folder = Path(checkpoint).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_file():
        raise UserError(f"{folder}: a file; name the checkpoint folder that it is in")
    if folder.is_dir():
        inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
        hint = f"; these have one: {', '.join(inside[:5])}" if inside else ""
        raise UserError(f"{folder}: not a checkpoint folder, it has no config.json{hint}")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(checkpoint)) and not folder.parent.is_dir():
        return _from_hub(str(checkpoint))
    raise UserError(f"{checkpoint}: no such checkpoint folder{_near(folder)}")


def _near(folder: Path) -> str:
    """A hint at folders with a similar name."""
    parent = folder.parent
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    close = [str(parent / name) for name in difflib.get_close_matches(folder.name, names)]
    close += difflib.get_close_matches(str(folder), ["tiny"])
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _from_hub(name: str) -> Path:
    """The local copy of a hub repository; a complete one is used as it is, without asking the network."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such folder, and to fetch it from the Hugging Face hub: pip install huggingface_hub"
        ) from None
    patterns = ["*.json", "*.tiktoken", "*.safetensors", "*.bin"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        FolderTensors(folder)
        return folder
    except (huggingface_hub.errors.LocalEntryNotFoundError, UserError):
        pass  # not in the cache, or only partly
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # no network, no such repository, no permission, disk full: the library has many
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: no such folder, and the Hugging Face hub did not give it: {reason}") from None


def read_config(folder: Path) -> QwenVLConfig:
    """The folder's `config.json`. Raises UserError naming the file and what is wrong with it."""
    raw = read_json(folder / "config.json")
    raw.pop(QUANTIZATION_CONFIG, None)  # says how files hold the weights, not what the model is; see `quantised.py`
    try:
        return QwenVLConfig.from_hf(raw)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def small_files(folder: Path, adapter: str | Path | None = None) -> SmallFiles:
    """Vocabulary, tokenizer and generation settings of a checkpoint folder.

    The generation settings in the folder of an `adapter` come first: one may have taught a base model to chat.
    """
    vocabulary, tokenizer, generation = (folder / name for name in (VOCABULARY, TOKENIZER_CONFIG, GENERATION_CONFIG))
    if adapter is not None and (Path(adapter).expanduser() / GENERATION_CONFIG).is_file():
        generation = Path(adapter).expanduser() / GENERATION_CONFIG
    return {
        "tokenizer_file": vocabulary if vocabulary.is_file() else None,
        "tokenizer_config": read_json(tokenizer) if tokenizer.is_file() else None,
        "generation_config": read_json(generation) if generation.is_file() else None,
    }


def write_small_files(folder: Path, config: QwenVLConfig, torch_dtype: str, small: SmallFiles) -> None:
    """Writes what `small` has, then config.json: with it the folder becomes a checkpoint.

    torch_dtype: how the weights are stored, for readers that go by it.
    """
    if small["tokenizer_file"] is not None:
        shutil.copyfile(small["tokenizer_file"], folder / VOCABULARY)
        default = {"model_max_length": config.max_position_embeddings, "tokenizer_class": "QWenTokenizer"}
        write_json(folder / TOKENIZER_CONFIG, small["tokenizer_config"] or default)
    if small["generation_config"] is not None:
        write_json(folder / GENERATION_CONFIG, small["generation_config"])
    if QUANTIZATION_CONFIG in config.extra:
        write_json(folder / QUANTIZE_CONFIG, config.extra[QUANTIZATION_CONFIG])
    write_json(folder / "config.json", dict(sorted((config.to_hf() | {"torch_dtype": torch_dtype}).items())))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def check_free(folder: Path) -> None:
    """Raises UserError if there is a file of this name or a folder with something in it: nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; name another folder or remove it first")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that appears under its name only when the block has ended well.

    Raises UserError if there is something of that name. What a killed process leaves is a neighbour named
    `.NAME.partial-...`.
    """
    folder = folder.expanduser().absolute()
    check_free(folder)
    temporary = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
