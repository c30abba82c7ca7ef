"""The verb `run`: a prompt -> an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from int8kit.cli.options import Db, parse_size
from int8kit.cli.terminal import STDOUT, Force, Json, note, quiet_libraries, show, stages
from int8kit.errors import InputError


def run(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text of an image. Repeatable. Default: a red bicycle.", show_default=False),
    ] = None,
    images: Annotated[int, typer.Option(help="Number of images of each prompt, with seeds that follow.")] = 1,
    model: Annotated[
        str, typer.Option(help="tiny, a local folder in diffusers' layout, or the hub id of an Ideogram 4.")
    ] = "tiny",
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Default: 1024x1024; 256x256 for tiny.")] = None,
    preset: Annotated[str, typer.Option(help="quality, default or turbo: 48, 20 or 12 steps.")] = "quality",
    steps: Annotated[int | None, typer.Option(help="Number of steps. Default: the preset's; 4 for tiny.")] = None,
    guidance: Annotated[float | None, typer.Option(help="One guidance scale instead of the preset's schedule.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the initial noise.")] = 0,
    variant: Annotated[
        str, typer.Option(help="Linears: int8, bf16, fp8, nf4, fake-quant or unfused, in the same pipeline.")
    ] = "int8",
    without: Annotated[
        list[str] | None, typer.Option(metavar="REPAIR", help="Switch a repair off, such as trim-text. Repeatable.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run the blocks of a variant without int8kit's kernels in torch.compile.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="GPU whose database is used. Default: the present one, else rtx3090.")
    ] = None,
    database: Db = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse entries of a database without a proof on this system.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG file.")] = Path("out/image.png"),
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Generate an image from a prompt, with the transformers' linears in INT8.

    The configurations come from the database, which is read once. The default model, tiny, has random weights: it shows
    that everything works, within seconds and without a GPU, and its image is noise.

    Example: int8kit run --prompt "a red bicycle" --output out/bicycle.png
    """
    from int8kit import files, gpus
    from int8kit.cli import layout, tables
    from int8kit.database import store
    from int8kit.runtime import generate, png

    tiny = model == "tiny"
    height, width = parse_size(size or ("256x256" if tiny else "1024x1024"))
    if output == STDOUT:
        raise InputError("--output -: the image is no text; name a PNG file, and use --json for the document")
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {str(output)!r}: the image is a PNG; name it {output.stem or 'image'}.png")
    request = generate.ImageRequest(
        tuple(prompt or ("a red bicycle against a white brick wall",)),
        model=model,
        height=height,
        width=width,
        preset=preset,
        steps=4 if tiny and steps is None else steps,
        guidance=guidance,
        images=images,
        seed=seed,
        variant=variant,
        without=tuple(without or ()),
        compile=compiled,
        gpu=gpu,
        database=database,
        strict=strict,
    )
    generate.check(request)
    named = gpus.get(gpu) if gpu is not None else None
    if database is not None:
        store.load(database, named.alias if named else None)
    for target in png.targets(output, len(request.prompts) * images):
        files.check_target(target, ours=png.is_ours, force=force)
    gpus.present()  # refuses a GPU that is not supported, before diffusers loads
    with stages() as stage:
        step = stage("importing diffusers and transformers", 1)
        quiet_libraries()
        step()
        outcome = generate.generate(request, stage)
    if unproven := generate.unproven_of(outcome.choices):
        note(
            f"{len(unproven)} of {layout.count(len(outcome.choices), 'configuration')} not proven with the present "
            "kernels; see `int8kit verify`"
        )
    paths = png.save(outcome, output)
    took = {key: value for key, value in vars(outcome).items() if key.endswith(("_s", "_ms", "_gib"))}
    choices = [
        {"m": c.shape.m, "n": c.shape.n, "k": c.shape.k, "layers": count, "config": vars(c.config), "level": c.level,
         "why": c.provenance, "verified": c.is_verified} for c, count in outcome.choices
    ]  # fmt: skip
    document = {
        "images": list(map(str, paths)),
        "device": outcome.device,
        "variant": variant,
        "fused": outcome.fused,
        "graphs": outcome.graphs,
        "attention": outcome.attention,
        "text_tokens": list(outcome.tokens),
        **took,
        "until_first_step_s": outcome.until_first_step_s,
        "databases": list(map(str, outcome.databases)),
        "configurations": choices,
    }
    show(document, f"{tables.run_tables(outcome)}\n\nwrote {', '.join(map(str, paths))}", as_json)
