"""runtime/velocity_errors.py and stock_branches.py: the errors of variants on the stock pipeline's latents."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from int8kit import models
from int8kit.errors import CheckFailed, InputError, ShapeError, UnknownName
from int8kit.runtime import velocity_errors
from int8kit.runtime.generate import ImageRequest
from int8kit.runtime.schedule import Schedule
from int8kit.runtime.stock_branches import StockBranches, noise
from int8kit.runtime.velocity_errors import Trajectory, evaluate, record, relative_error

CPU = torch.device("cpu")
SCHEDULE = Schedule(64, 96, (7.0, 3.0), 0.0, 1.5)
REQUEST = ImageRequest(("a red bicycle",), height=64, width=96, steps=2)


@pytest.fixture(scope="module")
def pipe():
    made = models.tiny_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def test_the_reference_has_the_bits_of_the_stock_pipeline(pipe):
    """Two prompts of other lengths, padded to the same slots."""
    prompts = ["a red bicycle", "a cat that sleeps"]
    theirs = pipe(
        prompts, height=64, width=96, num_inference_steps=2, guidance_schedule=[7.0, 3.0], output_type="latent",
        max_sequence_length=40, generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    branches = StockBranches(pipe, prompts, SCHEDULE, 40, CPU)
    trajectory = record(
        branches, SCHEDULE.guidance, SCHEDULE.scheduler(pipe, CPU), noise(pipe, SCHEDULE, 3, CPU, batch=2)
    )
    assert torch.equal(trajectory.latents[-1], theirs)
    assert len(trajectory.latents) == 3
    assert trajectory.noise_levels[0] > trajectory.noise_levels[1] > 0


def test_bad_calls_of_the_stock_branches(pipe):
    with pytest.raises(InputError, match="expected at most 9, the number of text slots"):
        StockBranches(pipe, "a red bicycle", SCHEDULE, 9, CPU)
    branches = StockBranches(pipe, "a cat", SCHEDULE, 40, CPU)
    for wrong in (torch.zeros(1, 24, 128).double(), torch.zeros(2, 24, 128), torch.zeros(24, 128)):
        with pytest.raises(ShapeError, match=r"expected \[1, 24, C\] in torch.float32"):
            branches.velocities(wrong, 0)


class Steps:
    """A scheduler that adds a tenth of the velocity."""

    timesteps = (torch.tensor(1.0), torch.tensor(0.5))
    sigmas = (1.0, 0.5, 0.0)

    def step(self, velocity, t, x, return_dict):
        return (x + 0.1 * velocity,)


class Known:
    """Branches whose velocities are the latents times known factors."""

    def __init__(self, cond, uncond):
        self.factors = cond, uncond

    def velocities(self, latents, step):
        return tuple(latents * factor for factor in self.factors)


def test_errors_of_known_velocities():
    start = torch.ones(1, 2, 3)
    trajectory = record(Known(2.0, 1.0), (7.0, 3.0), Steps(), start)
    assert isinstance(trajectory, Trajectory)
    built = {"floor": Known(2.0, 1.0), "other": Known(2.2, 0.9)}
    floor, other = evaluate(trajectory, list(built), lambda name: nullcontext(built[name]), drift=True)
    assert (floor.is_floor, other.is_floor) == (True, False)
    assert all(floor.mean(name) == 0 for name in floor.names)
    first, second = other.steps
    assert (first.step, first.guidance, first.noise_level, second.noise_level) == (1, 7.0, 1.0, 0.5)
    assert first.conditional == pytest.approx(0.1)
    assert first.unconditional == pytest.approx(0.1)
    # 7 * 2.2 - 6 * 0.9 = 10 for 7 * 2 - 6 = 8; then 3 * 2.2 - 2 * 0.9 = 4.8 for 4
    assert first.guided == pytest.approx(0.25)
    assert second.guided == pytest.approx(0.2)
    assert first.drift == pytest.approx(1.0)  # latents of 1 - 0.1 * 10 = 0 for 1 - 0.1 * 8 = 0.2
    assert other.worst("guided").step == 1
    assert other.mean("guided") == pytest.approx(0.225)


def test_a_velocity_that_is_not_finite():
    start = torch.ones(1, 2, 3)
    with pytest.raises(CheckFailed, match="stock pipeline, step 1: the unconditional velocity is not finite"):
        record(Known(1.0, torch.nan), (7.0, 3.0), Steps(), start)
    trajectory = record(Known(2.0, 1.0), (7.0, 3.0), Steps(), start)
    with pytest.raises(CheckFailed, match="variant 'x', step 1: the conditional velocity"):
        evaluate(trajectory, ["x"], lambda name: nullcontext(Known(torch.inf, 1.0)))


def test_relative_errors():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


def test_variants_of_the_tiny_model():
    report = velocity_errors.compare(REQUEST, ["int8"], slots=40, drift=True)
    floor, int8 = report.variants
    assert (floor.variant, floor.is_floor, int8.variant) == ("bf16", True, "int8")
    for name in int8.names:
        assert floor.mean(name) < int8.mean(name) < 0.02
    assert report.text_tokens == (31,)


def test_bad_requests():
    with pytest.raises(UnknownName, match="unknown variant 'int4'"):
        velocity_errors.compare(REQUEST, ["int4"])
    with pytest.raises(InputError, match="0 steps"):
        velocity_errors.compare(replace(REQUEST, steps=0), ["int8"])
    with pytest.raises(InputError, match="expected at most 20, the number of text slots"):
        velocity_errors.compare(REQUEST, ["int8"], slots=20)
