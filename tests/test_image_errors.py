"""image_errors.py: PSNR, MS-SSIM and FLIP of image files."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from int8kit import image_errors
from int8kit.errors import FileError, InputError, ShapeError
from int8kit.image_errors import Pair, measure

SIDE = 176


def picture(seed=0, size=SIDE):
    """Smooth colours with some noise."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = np.stack([np.sin(7 * x + y), np.cos(5 * y), np.sin(9 * x * y)], -1)
    noise = np.random.default_rng(seed).normal(0, 0.05, waves.shape)
    return np.clip(127 + 100 * (waves + noise), 0, 255).astype(np.uint8)


def save(path, array, **options):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def pair(tmp_path):
    first = picture()
    second = first.copy()
    second[:, : SIDE // 2] = np.clip(second[:, : SIDE // 2].astype(int) + 10, 0, 255)
    return Pair(save(tmp_path / "a.png", first), save(tmp_path / "b.png", second), "map.png")


def test_a_difference_in_one_half(pair):
    errors, error_map = measure(pair)
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (pair.a, pair.b))
    assert errors.psnr_db == pytest.approx(10 * math.log10(255**2 / ((a - b) ** 2).mean()))
    assert 0.9 < errors.ms_ssim < 1
    assert 0 < errors.flip < 0.2
    brightness = np.asarray(error_map).sum(-1)
    assert (errors.width, errors.height) == error_map.size == (SIDE, SIDE)
    assert brightness[:, : SIDE // 2 - 10].mean() > 5 * brightness[:, SIDE // 2 + 10 :].mean()


def test_equal_images(pair):
    errors, error_map = measure(Pair(pair.a, pair.a, "x.png"))
    assert (errors.psnr_db, errors.flip) == (math.inf, 0)
    assert errors.ms_ssim == pytest.approx(1, abs=1e-12)
    assert np.asarray(error_map).max() <= 4  # the colour of zero
    other, _ = measure(pair)
    mean = image_errors.mean([errors, other])
    assert (mean.psnr_db, mean.pairs, mean.equal) == (other.psnr_db, 2, 1)


def test_folders_by_equal_names(tmp_path):
    for folder in ("one", "two"):
        for name in ("x.png", "y.webp"):
            save(tmp_path / folder / name, picture())
    (tmp_path / "one" / "notes.txt").write_text("no image")
    pairs = image_errors.pair(tmp_path / "one", tmp_path / "two")
    assert [(p.a.name, p.b.name, p.map_name) for p in pairs] == [
        ("x.png", "x.png", "x.png"), ("y.webp", "y.webp", "y.png"),
    ]  # fmt: skip
    (tmp_path / "two" / "y.webp").unlink()
    with pytest.raises(FileError, match=r"y\.webp' has no partner in .*two"):
        image_errors.pair(tmp_path / "one", tmp_path / "two")
    with pytest.raises(FileError, match=r"is a folder and .* does not exist; expected two files or two folders"):
        image_errors.pair(tmp_path / "one", tmp_path / "three")


def test_files_that_cannot_be_compared(tmp_path, pair):
    small = save(tmp_path / "small.png", picture(size=100))
    large = save(tmp_path / "large.png", picture(size=200))
    text = tmp_path / "text.png"
    text.write_text("no image")
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(deep)
    clear = np.dstack([picture(), np.full((SIDE, SIDE), 200, np.uint8)])
    save(tmp_path / "clear.png", clear)
    for path, kind, reason in (
        (large, ShapeError, "has 176x176 pixels and .* 200x200; expected equal sizes"),
        (text, FileError, "it has another format or is damaged; expected a PNG, JPEG or WebP"),
        (deep, FileError, "pixels of mode 'I;16'; expected 8 bits a channel"),
        (tmp_path / "none.png", FileError, "no file .*none.png"),
        (tmp_path, FileError, "it is a folder"),
    ):
        with pytest.raises(kind, match=reason):
            image_errors.check([Pair(pair.a, path, "m.png")])
    with pytest.raises(ShapeError, match="expected at least 161 a side"):
        image_errors.check([Pair(small, small, "m.png")])
    with pytest.raises(FileError, match="transparent pixels"):
        measure(Pair(pair.a, tmp_path / "clear.png", "m.png"))


def test_the_command(tmp_path, pair, verb):
    maps = tmp_path / "maps"
    table, _ = verb("compare", "--images", pair.a, pair.b, "--maps", maps)
    assert len(table.splitlines()) == 3
    assert [path.name for path in maps.iterdir()] == ["a-b.png"]
    document = json.loads(verb("compare", "--images", pair.a, pair.a, "--json")[0])
    assert document["pairs"][0]["psnr_db"] is None  # JSON has no infinity
    assert document["mean"]["equal"] == 1
    image_errors.check_maps(maps, [pair], force=False)
    again = image_errors.pair(pair.a, pair.b)
    with pytest.raises(FileError, match=r"a-b\.png' exists; name another folder, or use --force"):
        image_errors.check_maps(maps, again, force=False)
    image_errors.check_maps(maps, again, force=True)
    with pytest.raises(FileError, match="would replace a compared image"):
        image_errors.check_maps(tmp_path, [Pair(pair.a, pair.b, "a.png")], force=True)


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(image_errors, "_PACKAGES", {"flip_evaluator_absent": "flip-evaluator"})
    with pytest.raises(InputError, match=r"comparing images needs flip-evaluator .*int8kit\[images\]"):
        image_errors.require()
