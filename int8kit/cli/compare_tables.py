"""Tables of `compare --velocities` and `compare --images`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from int8kit.cli.layout import fit

if TYPE_CHECKING:
    from int8kit.image_errors import ImageErrors, MeanErrors
    from int8kit.runtime.velocity_errors import VariantErrors, VelocityReport


def velocities(report: VelocityReport, each_step: bool) -> str:
    """The relative errors of each variant: mean and largest over the steps, or each step."""
    names = report.variants[0].names
    if each_step:
        rows = [
            (
                _name(one),
                str(s.step),
                f"{s.noise_level:.3f}",
                f"{s.guidance:g}",
                *(f"{getattr(s, n):.5f}" for n in names),
            )
            for one in report.variants
            for s in one.steps
        ]
        return fit(rows, ("variant", "step", "noise", "guidance", *names), left="variant")
    means = [
        (_name(one), *(f"{one.mean(n):.5f}, {getattr(one.worst(n), n):.5f} in {one.worst(n).step}" for n in names))
        for one in report.variants
    ]
    head = tuple(f"{name}: mean, worst in step" for name in names)
    return fit(means, ("variant", *head), left="variant")


def _name(one: VariantErrors) -> str:
    return f"{one.variant}, the floor" if one.is_floor else one.variant


def images(found: Sequence[ImageErrors], mean: MeanErrors) -> str:
    """A row for each pair, and the means."""
    rows = [
        (one.a, one.b, f"{one.width}x{one.height}", f"{one.psnr_db:.2f}", f"{one.ms_ssim:.5f}", f"{one.flip:.5f}")
        for one in found
    ]
    if len(found) > 1:
        label = f"mean of {mean.pairs}" + (f", {mean.equal} equal" if mean.equal else "")
        rows.append((label, "", "", f"{mean.psnr_db:.2f}", f"{mean.ms_ssim:.5f}", f"{mean.flip:.5f}"))
    return fit(rows, ("A", "B", "size", "PSNR dB", "MS-SSIM", "FLIP"), left="A,B,size")
