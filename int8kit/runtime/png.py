"""PNG files of generated images, each with its request as JSON in the text chunk "int8kit"."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from int8kit import __version__, files

if TYPE_CHECKING:
    from int8kit.runtime.generate import GeneratedImages


def targets(path: Path, count: int) -> list[Path]:
    """The files of `count` images: `path`, and then name-2.png, name-3.png beside it."""
    return [path if i == 0 else path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]


def save(generated: GeneratedImages, path: Path) -> list[Path]:
    """Write the PNGs with their request in the text chunk "int8kit" -> their paths, see `targets`. Raises FileError."""
    request = asdict(generated.request)
    for name in ("prompts", "images", "database", "strict"):
        request.pop(name)
    if Path(generated.request.model).is_dir():
        request["model"] = Path(generated.request.model).resolve().name  # images are published: no path in them
    request = {key: value for key, value in request.items() if not (value is None or value is False or value == ())}
    from PIL.PngImagePlugin import PngInfo

    paths = targets(path, len(generated.images))
    for i, (image, target) in enumerate(zip(generated.images, paths, strict=True)):
        prompt = generated.request.prompts[i // generated.request.images]
        own = {**request, "prompt": prompt, "seed": generated.request.seed + i, "steps": generated.steps}
        info = PngInfo()
        info.add_text("int8kit", json.dumps({**own, "versions": versions()}))
        with files.replacing(target) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
    return paths


def is_ours(path: Path) -> bool:
    """True if `path` is a PNG that `save` wrote."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return "int8kit" in image.info
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # broken chunks have each of them
        return False


def versions() -> dict[str, str]:
    """Versions of everything that can change an image. Contains no host name, user or path."""
    return {
        "int8kit": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
