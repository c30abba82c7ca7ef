"""The verb `compare`: the error of INT8 in a model, layer by layer or step by step, and the difference of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from int8kit import files
from int8kit.cli.options import parse_size
from int8kit.cli.terminal import Force, Json, Output, check_output, progress, quiet_libraries, show, stages
from int8kit.errors import FileError, InputError


def compare(
    model: Annotated[
        str | None, typer.Argument(help="tiny, a local folder in diffusers' layout, or a hub id.", show_default=False)
    ] = None,
    velocities: Annotated[
        bool, typer.Option("--velocities", help="Compare the denoising step by step with the stock pipeline.")
    ] = False,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --velocities, as in `run`. Repeatable. Default: int8."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="With --velocities: text of an image. Repeatable.", show_default=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="With --velocities. Default: 1024x1024; tiny: 256x256.")
    ] = None,
    preset: Annotated[str, typer.Option(help="With --velocities: quality, default or turbo.")] = "quality",
    steps: Annotated[int | None, typer.Option(help="With --velocities. Default: the preset's; 4 for tiny.")] = None,
    drift: Annotated[
        bool, typer.Option("--drift", help="With --velocities: also the latents of each variant on its own way.")
    ] = False,
    each_step: Annotated[bool, typer.Option("--each-step", help="With --velocities: a row for each step.")] = False,
    images: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--images", metavar="A B", help="Two image files, or two folders with equal file names."),
    ] = None,
    maps: Annotated[Path | None, typer.Option(help="With --images: folder for FLIP's error maps.")] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="File by torch.save with the arguments of the model's forward passes. Default: random ones."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the inputs, or of the noise.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Compare a model's linears in INT8 with the originals, layer by layer: the layers with the largest error first.

    --velocities compares each denoising step of a variant with the stock pipeline, on the same latents, and puts the
    error of bf16 beside it. --images compares finished images: PSNR, MS-SSIM and FLIP.

    Example: int8kit compare tiny
    """
    if images is not None:
        if model is not None or velocities:
            raise InputError("--images compares files: leave the model and --velocities out")
        _images(images, maps, output, as_json, force)
        return
    if model is None:
        raise InputError("compare: expected a model such as tiny, or --images A B")
    if maps is not None:
        raise InputError("--maps goes with --images")
    from int8kit import models

    models.check_pipeline(model)
    models.check_seed(seed)
    if velocities:
        if inputs is not None:
            raise InputError("--inputs goes with the comparison of layers: leave --velocities out")
        given = {"model": model, "prompt": prompt, "size": size, "preset": preset, "steps": steps, "seed": seed}
        _velocities(given, variant or ["int8"], drift, each_step, output, as_json, force)
        return
    for name, value in (("--variant", variant), ("--prompt", prompt), ("--size", size), ("--steps", steps)):
        if value is not None:
            raise InputError(f"{name} goes with --velocities")
    _layers(model, inputs, seed, markdown, output, as_json, force)


def _layers(
    model: str, inputs: Path | None, seed: int, markdown: bool, output: Path | None, as_json: bool, force: bool
) -> None:
    """The error of each layer."""
    from dataclasses import asdict

    from int8kit import models

    if inputs is not None:
        _check_inputs(inputs)
    check_output(output, force)
    quiet_libraries()
    from int8kit.cli import tables
    from int8kit.runtime import layer_errors

    tiny = model == models.TINY
    side = 256 if tiny else 1024
    case = models.Case(side, side, text_tokens=32 if tiny else 200)
    with progress("comparing") as (bar, task):

        def on_layer(total: int) -> None:
            bar.update(task, total=total)
            bar.advance(task)

        branches = layer_errors.compare(model, case, seed=seed, inputs=inputs, on_layer=on_layer)
    document = {"model": model, "inputs": "given" if inputs else "random", "branches": [asdict(b) for b in branches]}
    show(document, tables.layers_table(branches, markdown), as_json, output)


def _velocities(
    given: dict[str, Any],
    names: list[str],
    drift: bool,
    each_step: bool,
    output: Path | None,
    as_json: bool,
    force: bool,
) -> None:
    """The errors of variants in each step."""
    from dataclasses import asdict

    from int8kit.cli import compare_tables
    from int8kit.runtime import generate, variants

    tiny = given["model"] == "tiny"
    height, width = parse_size(given["size"] or ("256x256" if tiny else "1024x1024"))
    request = generate.ImageRequest(
        tuple(given["prompt"] or ("a red bicycle against a white brick wall",)),
        model=given["model"],
        height=height,
        width=width,
        preset=given["preset"],
        steps=4 if tiny and given["steps"] is None else given["steps"],
        seed=given["seed"],
    )
    for name in names:
        variants.check(name)
    generate.check(request)
    check_output(output, force)
    with stages() as stage:
        quiet_libraries()
        from int8kit.runtime import velocity_errors

        report = velocity_errors.compare(request, names, drift=drift, progress=stage)
    document = {
        "model": request.model,
        "prompts": list(request.prompts),
        "size": f"{width}x{height}",
        "device": report.device,
        "text_tokens": list(report.text_tokens),
        "text_slots": report.text_slots,
        "variants": [asdict(one) for one in report.variants],
    }
    show(document, compare_tables.velocities(report, each_step), as_json, output)


def _images(pair: tuple[Path, Path], maps: Path | None, output: Path | None, as_json: bool, force: bool) -> None:
    """The difference of images."""
    from dataclasses import asdict

    from int8kit import image_errors
    from int8kit.cli import compare_tables

    check_output(output, force)
    image_errors.require()
    pairs = image_errors.pair(*pair)
    image_errors.check(pairs)
    if maps is not None:
        image_errors.check_maps(maps, pairs, force=force)
    found = []
    with progress("comparing") as (bar, task):
        bar.update(task, total=len(pairs))
        for one in pairs:
            errors, error_map = image_errors.measure(one)
            if maps is not None:
                image_errors.save_map(error_map, maps / one.map_name)
            found.append(errors)
            bar.advance(task)
    mean = image_errors.mean(found)
    document = {"pairs": [asdict(one) for one in found], "mean": asdict(mean)}
    show(_finite(document), compare_tables.images(found, mean), as_json, output)


def _finite(value: Any) -> Any:
    """JSON has no infinity, so the PSNR of equal images is null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if value == float("inf") else value


def _check_inputs(path: Path) -> None:
    """Raise FileError for a file that torch.save did not write, as its first bytes show."""
    remedy = "expected a file that torch.save wrote"
    if not path.name:  # "" and "." name the present folder
        raise FileError(f"--inputs {str(path)!r}: it is a folder; {remedy}")
    if (kind := files.kind_of(path)) is not None:
        raise FileError(f"--inputs {str(path)!r}: it is a {kind}; {remedy}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise FileError(f"--inputs {str(path)!r}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"--inputs {str(path)!r}: cannot read it ({reason}); {remedy}") from None
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a pickle of older versions
        found = "it has another format" if start else "it is empty"
        raise FileError(f"--inputs {str(path)!r}: {found}; {remedy}")
