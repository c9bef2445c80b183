"""Where pre-training starts: a Qwen-VL folder put together from a Qwen-7B and an OpenCLIP vision transformer.

    python -m qwenvl_jax.checkpoints.assemble Qwen/Qwen-7B OPENCLIP DST

The resampler between the two, its norm and its projection are new (Qwen-VL paper, section 2.1 and 3.1). OpenCLIP's
class token, final norm, projection and text tower have no place in Qwen-VL and are left out.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.checkpoints.folder import check_free, locate, small_files
from qwenvl_jax.checkpoints.huggingface import check_tensors, checkpoint_tensors, read_as, write_folder
from qwenvl_jax.checkpoints.qwen_vl import Tensor, is_harmless_extra
from qwenvl_jax.checkpoints.tensor_files import FolderTensors, NamedTensors, open_tensors, read_json, some
from qwenvl_jax.config import QwenVLConfig, UserError, VisionConfig
from qwenvl_jax.models.qwen_vl import VisionTower
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.sharding import param_paths

OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
VISUAL = "transformer.visual."
# Qwen-VL's own; all the rest of the visual tower is OpenCLIP's.
NEW = re.compile(r"transformer\.visual\.(attn_pool\.|ln_post\.|proj$)")
LEFT_OUT = re.compile(r"class_embedding|ln_post\..*|proj")  # of OpenCLIP's visual tower


class OpenClipTensors:
    """The visual tower of an OpenCLIP folder under Qwen-VL's names and in its layout; offers what `FolderTensors` does.

    Raises UserError for a folder without an OpenCLIP model, or one of another architecture than ViT's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        source = next((name for name in OPENCLIP_WEIGHTS if (folder / name).is_file()), None)
        if source is None or not (folder / OPENCLIP_CONFIG).is_file():
            raise UserError(f"{folder}: not an OpenCLIP folder; it needs {OPENCLIP_CONFIG} and {OPENCLIP_WEIGHTS[0]}")
        self.file = open_tensors(folder / source)
        raw = read_json(folder / OPENCLIP_CONFIG)
        try:
            self.vision = raw["model_cfg"]["vision_cfg"]
            self.sizes = {name: self.vision[name] for name in ("image_size", "layers", "width", "patch_size")}
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / OPENCLIP_CONFIG}: no {error} of a vision transformer in it") from None
        head_width = self.vision.get("head_width", 64)  # OpenCLIP's defaults
        self.heads = self.sizes["width"] // head_width
        self.mlp_ratio = self.vision.get("mlp_ratio", 4.0)
        names = [name.removeprefix("visual.") for name in self.file.names() if name.startswith("visual.")]
        self._sources = {self._name(name): name for name in names if not LEFT_OUT.fullmatch(name)}

    @staticmethod
    def _name(name: str) -> str:
        return VISUAL + re.sub(r"attn\.in_proj_(weight|bias)", r"attn.in_proj.\1", name)

    def names(self) -> list[str]:
        return list(self._sources)

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        shape, dtype = self.file.describe(f"visual.{self._sources[name]}")
        return ((shape[0] - 1, *shape[1:]) if name.endswith("positional_embedding") else shape), dtype

    def read(self, name: str) -> np.ndarray:
        value = self.file.read(f"visual.{self._sources[name]}")
        if name.endswith("positional_embedding"):
            return value[1:]  # the first place is the class token's
        if ".attn.in_proj." in name:  # thirds of queries, keys and values to the three of each head
            thirds = value.reshape(3, self.heads, -1, *value.shape[1:])
            return thirds.swapaxes(0, 1).reshape(value.shape)
        return value


def assemble(
    language: str | Path, vision: str | Path, destination: str | Path, *, image_size: int | None = None, seed: int = 0
) -> QwenVLConfig:
    """Writes the folder `destination`, in the dtype of the language model, and returns its configuration.

    language: a Qwen-7B folder (not Qwen-VL) or hub name; vision: a folder of OpenCLIP's; image_size: pixels, default
    that of OpenCLIP's training; seed: of the new weights. Raises UserError naming what does not fit.
    """
    destination = Path(destination).expanduser()
    check_free(destination)
    words, pictures = FolderTensors(locate(language)), OpenClipTensors(Path(vision).expanduser())
    small = small_files(words.folder)
    if small["tokenizer_file"] is None:
        raise UserError(f"{words.folder}: has no qwen.tiktoken, which the new folder needs")
    config = _config(words.folder, pictures, image_size, small["tokenizer_file"])
    wanted = checkpoint_tensors(config)
    new = [tensor for tensor in wanted if NEW.match(tensor.name)]
    kept = [tensor for tensor in wanted if not NEW.match(tensor.name)]
    for files in (words, pictures):
        is_visual = files is pictures
        _check([tensor for tensor in kept if tensor.name.startswith(VISUAL) == is_visual], files)
    dtype = words.describe("transformer.wte.weight")[1]
    start = _new_parameters(config, seed)

    def value(tensor: Tensor) -> np.ndarray:
        if tensor in new:
            return tensor.from_parameter(start[tensor.path].astype(dtype))
        return tensor.from_parameter(read_as(pictures if tensor.name.startswith(VISUAL) else words, tensor, dtype))

    described = {tensor.name: (tensor.shape, dtype) for tensor in wanted}
    write_folder(destination, (config, described, map(value, wanted)), small)
    return config


def _config(language: Path, vision: OpenClipTensors, image_size: int | None, vocabulary: Path) -> QwenVLConfig:
    raw = read_json(language / "config.json")
    if "visual" in raw:
        raise UserError(f"{language}: is a Qwen-VL already; name a Qwen language model")
    visual = VisionConfig(
        image_size=image_size or vision.sizes["image_size"],
        patch_size=vision.sizes["patch_size"],
        width=vision.sizes["width"],
        layers=vision.sizes["layers"],
        heads=vision.heads,
        mlp_ratio=vision.mlp_ratio,
        output_dim=raw.get("hidden_size", 0),
        image_start_id=Tokenizer.from_file(vocabulary).image_start_id,
    )
    visual_fields = {name: getattr(visual, name) for name in visual.__dataclass_fields__}
    try:
        return QwenVLConfig.from_hf(raw | {"visual": visual_fields})
    except UserError as error:
        raise UserError(f"{language}: {error}") from None


def _check(wanted: list[Tensor], files: NamedTensors) -> None:
    """As `check_tensors`, with a word about what the files should be."""
    unexpected = [n for n in files.names() if not is_harmless_extra(n) and n not in {t.name for t in wanted}]
    if len(unexpected) > len(wanted):
        raise UserError(f"{files.folder}: its tensors are not those of this architecture: {some(unexpected)}")
    check_tensors(wanted, files)


def _new_parameters(config: QwenVLConfig, seed: int) -> dict[str, np.ndarray]:
    """The parameters of the vision tower without its transformer, by path, float32; a small part of the model."""

    def tower():
        small = VisionConfig(**{**config.visual.__dict__, "layers": 1})
        return VisionTower(small, residual_std=0.02, dtype=jnp.float32, rngs=nnx.Rngs(seed))

    made = param_paths(jax.jit(tower)())
    return {f"visual.{path}": np.asarray(leaf) for path, leaf in made.items() if not path.startswith("vit.")}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 for a mistake of the user's, explained in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m qwenvl_jax.checkpoints.assemble", description=__doc__.split("\n")[0]
    )
    parser.add_argument("language", help="a Qwen-7B folder or hub name")
    parser.add_argument("vision", help="a folder with open_clip_config.json and its weights")
    parser.add_argument("destination", help="a folder that does not exist yet or is empty")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="default: that of OpenCLIP's training")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        config = assemble(given.language, given.vision, given.destination, image_size=given.image_size, seed=given.seed)
    except UserError as error:
        print(f"assemble: {error}", file=sys.stderr)
        return 2
    pixels = config.visual.image_size
    print(f"{given.destination}: {len(checkpoint_tensors(config)):,} tensors, pictures of {pixels} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
