"""The difference of two images: PSNR, MS-SSIM and FLIP, with FLIP's error map.

    pairs = pair(Path("a"), Path("b"))      two files, or the files of equal names in two folders
    check(pairs)                            every size and every format, before any long work
    errors, error_map = measure(pairs[0])   ImageErrors(psnr_db=..., ms_ssim=..., flip=...), and a picture

PSNR compares the 8-bit values of all three channels; it is infinite for equal images. MS-SSIM is the mean over the
channels; 1 means equal. FLIP estimates the difference that a person sees, from 0 to 1. It assumes a distance from the
screen at which one degree of the field of view has `PIXELS_PER_DEGREE` pixels.

Images have 8 bits a channel and no transparent pixel. An image appears as a viewer shows it, so a camera's rotation is
applied. The packages of the extra `images` are imported by the functions that need them.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8kit import files
from int8kit.errors import FileError, InputError, ShapeError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
LEAST_SIDE = 161  # pixels: MS-SSIM halves an image four times, and its window of 11 pixels still has to fit
PIXELS_PER_DEGREE = 67.0  # FLIP's own default: a 4K screen 0.7 m wide, seen from 0.7 m
MARK = "int8kit"  # name of the text chunk of an error map
_MODES = ("L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel
_ORIENTATION = 0x0112  # tag of EXIF
_REMEDY = "expected a PNG, JPEG or WebP image"
_PACKAGES = {
    "flip_evaluator": "flip-evaluator", "numpy": "numpy", "PIL": "pillow", "pytorch_msssim": "pytorch-msssim",
}  # fmt: skip
_EXTRA = "install it with `pip install 'int8kit[images]'`"


@dataclass(frozen=True)
class Pair:
    """Two image files that are compared, and the name of their error map."""

    a: Path
    b: Path
    map_name: str


@dataclass(frozen=True)
class ImageErrors:
    """The difference of two images of one size."""

    a: str
    b: str
    width: int
    height: int
    psnr_db: float  # infinite if the two are equal
    ms_ssim: float
    flip: float  # mean of the error map


@dataclass(frozen=True)
class MeanErrors:
    """Means over pairs of images."""

    psnr_db: float  # over the pairs that differ; infinite if none does
    ms_ssim: float
    flip: float
    pairs: int
    equal: int  # pairs of equal images


def require() -> None:
    """Import what `measure` needs. Raises InputError that names a missing package and the extra."""

    for module, package in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"comparing images needs {package} ({reason}); {_EXTRA}") from None


def pair(a: Path, b: Path) -> list[Pair]:
    """The pairs of two files, or of two folders with equal file names, in the order of their names.

    A folder's files of other kinds and its subfolders do not count. Raises FileError.
    """
    if not os.path.isdir(a) and not os.path.isdir(b):
        return [Pair(a, b, f"{a.stem}.png" if a.name == b.name else f"{a.stem}-{b.stem}.png")]
    for one, other in ((a, b), (b, a)):
        if not os.path.isdir(one):
            kind = "is a file" if os.path.lexists(one) else "does not exist"
            raise FileError(f"{str(other)!r} is a folder and {str(one)!r} {kind}; expected two files or two folders")
    names = {folder: _images(folder) for folder in (a, b)}
    for one, other in ((a, b), (b, a)):
        if alone := sorted(names[one] - names[other]):
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            has = "have no partners" if more else "has no partner"
            raise FileError(f"{str(one / alone[0])!r}{more} {has} in {str(other)!r}; expected files of equal names")
    if not names[a]:
        raise FileError(f"no image in {str(a)!r} and {str(b)!r}; expected files with {', '.join(SUFFIXES)}")
    stems = {Path(name).stem for name in names[a]}
    named = {name: Path(name).stem if len(stems) == len(names[a]) else name for name in names[a]}
    return [Pair(a / name, b / name, f"{named[name]}.png") for name in sorted(names[a])]


def _images(folder: Path) -> set[str]:
    """Names of the images in a folder."""
    try:
        return {path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.is_dir()}
    except OSError as error:
        raise FileError(f"cannot read {str(folder)!r} ({error.strerror}); expected a folder of images") from None


def check(pairs: Iterable[Pair]) -> None:
    """Raise FileError for a file that is no image, and ShapeError for sizes that differ or are too small.

    Reads the head of each file only, so that a mistake shows before any long work.
    """
    for one in pairs:
        _check_sizes(one, _open(one.a, _size), _open(one.b, _size))


def check_maps(folder: Path, pairs: Sequence[Pair], *, force: bool) -> None:
    """Raise FileError unless the error map of each pair can be written to `folder`.

    A map that exists is replaced only with `force`, and an image that is compared never.
    """
    inputs = {path.resolve() for one in pairs for path in (one.a, one.b)}
    for one in pairs:
        target = folder / one.map_name
        if target.resolve() in inputs:
            raise FileError(f"the error map {str(target)!r} would replace a compared image; name another folder")
        if target.exists() and not force:
            raise FileError(f"{str(target)!r} exists; name another folder, or use --force")
        files.check_target(target, ours=lambda path: False, force=force)


def _check_sizes(one: Pair, a: tuple[int, int], b: tuple[int, int]) -> None:
    if a != b:
        raise ShapeError(
            f"{str(one.a)!r} has {a[0]}x{a[1]} pixels and {str(one.b)!r} {b[0]}x{b[1]}; expected equal sizes"
        )
    if min(a) < LEAST_SIDE:
        raise ShapeError(
            f"{str(one.a)!r} has {a[0]}x{a[1]} pixels; expected at least {LEAST_SIDE} a side, because MS-SSIM halves "
            "the image four times"
        )


def measure(one: Pair) -> tuple[ImageErrors, Image.Image]:
    """The difference of a pair and its error map, in colours from black (equal) to pale yellow (1).

    Raises InputError without the extra `images`, and otherwise as `check`.
    """
    require()
    import numpy as np

    pixels = [np.asarray(_open(path, _rgb)) for path in (one.a, one.b)]
    sizes = [(int(p.shape[1]), int(p.shape[0])) for p in pixels]
    _check_sizes(one, *sizes)
    flip, error_map = _flip(*pixels)
    width, height = sizes[0]
    found = ImageErrors(str(one.a), str(one.b), width, height, psnr(*pixels), ms_ssim(*pixels), flip)
    return found, error_map


def psnr(a: Any, b: Any) -> float:
    """Peak signal-to-noise ratio in decibels of two uint8 arrays of one shape; infinite if they are equal."""
    import numpy as np

    squares = np.square(a.astype(np.int64) - b.astype(np.int64)).sum()  # exact
    return 10 * math.log10(255.0**2 * a.size / int(squares)) if squares else math.inf


def ms_ssim(a: Any, b: Any) -> float:
    """Multi-scale structural similarity of two uint8 arrays [H, W, 3], in float64."""
    import pytorch_msssim
    import torch

    tensors = [torch.tensor(one).permute(2, 0, 1)[None].double() for one in (a, b)]
    return float(pytorch_msssim.ms_ssim(*tensors, data_range=255))


def _flip(a: Any, b: Any) -> tuple[float, Image.Image]:
    """FLIP of two uint8 arrays [H, W, 3], and its map in colours."""
    import flip_evaluator
    import numpy as np
    from PIL import Image

    values = [one.astype(np.float32) / np.float32(255) for one in (a, b)]
    colours, mean, _ = flip_evaluator.evaluate(*values, "LDR", parameters={"ppd": PIXELS_PER_DEGREE})
    return float(mean), Image.fromarray(np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8))


def mean(errors: Sequence[ImageErrors]) -> MeanErrors:
    """Means over one or more pairs. An infinite PSNR would hide the others, so equal images do not count in it."""
    finite = [one.psnr_db for one in errors if math.isfinite(one.psnr_db)]
    return MeanErrors(
        psnr_db=statistics.fmean(finite) if finite else math.inf,
        ms_ssim=statistics.fmean(one.ms_ssim for one in errors),
        flip=statistics.fmean(one.flip for one in errors),
        pairs=len(errors),
        equal=len(errors) - len(finite),
    )


def save_map(error_map: Image.Image, path: Path) -> None:
    """Write an error map as PNG, in one step. Raises FileError."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(MARK, f"FLIP error map, {PIXELS_PER_DEGREE:g} pixels per degree")
    with files.replacing(path) as temporary:
        error_map.save(temporary, format="PNG", pnginfo=info)


def _open(path: Path, read: Callable[[Path, Image.Image], Any]) -> Any:
    """`read` of an image file. Raises FileError for a file that is no still image of 8 bits."""
    from PIL import Image, UnidentifiedImageError

    if (kind := files.kind_of(path)) is not None:
        raise FileError(f"cannot read {str(path)!r}: it is a {kind}; {_REMEDY}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if (frames := getattr(image, "n_frames", 1)) > 1:
                    raise FileError(f"{str(path)!r} has {frames} frames; expected a still image")
                if image.mode not in _MODES:
                    raise FileError(f"{str(path)!r} has pixels of mode {image.mode!r}; expected 8 bits a channel")
                return read(path, image)
    except FileNotFoundError:
        raise FileError(f"no file {str(path)!r}; {_REMEDY}") from None
    except UnidentifiedImageError:
        raise FileError(f"cannot read {str(path)!r}: it has another format or is damaged; {_REMEDY}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise FileError(f"{str(path)!r} has more than {Image.MAX_IMAGE_PIXELS} pixels; name a smaller image") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # damage, each decoder in its own way
        raise FileError(f"cannot read {str(path)!r} ({getattr(error, 'strerror', None) or error}); {_REMEDY}") from None


def _size(_: Path, image: Image.Image) -> tuple[int, int]:
    """Width and height as a viewer shows the image."""
    turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)  # these swap the sides
    return (image.height, image.width) if turned else (image.width, image.height)


def _rgb(path: Path, image: Image.Image) -> Image.Image:
    """The image in RGB, as a viewer shows it. Raises FileError for a transparent pixel."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data and upright.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise FileError(f"{str(path)!r} has transparent pixels; expected an opaque image")
    return upright.convert("RGB")
