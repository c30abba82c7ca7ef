"""runtime/: image generation on a CPU, and its Ideogram 4 pipeline."""

import copy
from dataclasses import replace

import pytest
import torch
import triton
from PIL import Image

from int8kit import gpus, models
from int8kit.database import store
from int8kit.database.schema import Entry, Resources, stamp
from int8kit.errors import CheckFailed, FileError, InputError, UnknownName
from int8kit.kernels import gemm
from int8kit.lookup import DEFAULT, LEVELS
from int8kit.runtime import generate, ideogram4
from int8kit.runtime.generate import PRESETS, ImageRequest
from int8kit.spec import Source, default_config


def test_presets_follow_the_authors_schedules():
    assert PRESETS["quality"].guidance(48) == [7.0] * 45 + [3.0] * 3
    assert PRESETS["default"].guidance(20) == [7.0] * 18 + [3.0] * 2
    assert PRESETS["turbo"].guidance(12) == [7.0] * 11 + [3.0]
    assert PRESETS["quality"].guidance(1) == [7.0]
    assert PRESETS["quality"].guidance(4) == [7.0] * 3 + [3.0]


REQUEST = ImageRequest("a red bicycle", height=64, width=96, steps=2)


@pytest.fixture(scope="module")
def generated():
    return generate.generate(REQUEST)


def test_image_is_written_with_its_request(generated, tmp_path):
    assert generated.image.size == (96, 64)
    assert generated.steps == 2
    assert generated.tokens == len("<user\na red bicycle<\n<assistant")  # a byte each, and < for each special token
    times = generated.load_s, generated.prepare_s, generated.denoise_s, generated.step_ms
    assert min(*times, generated.peak_gib) > 0
    path = tmp_path / "a.png"
    assert not generate.is_ours(path)
    generate.save(generated, path)
    assert generate.is_ours(path)
    with Image.open(path) as image:
        image.load()
        assert image.size == (96, 64)
        for word in ("a red bicycle", '"seed": 0', '"torch"', '"steps": 2'):
            assert word in image.info["int8kit"]
    assert list(tmp_path.iterdir()) == [path]


def test_choices_are_those_of_the_shapes_that_run(generated):
    image, text = 4 * 6, generated.tokens
    assert {choice.shape.m for choice, _ in generated.choices} == {image, image + text}
    assert sum(count for _, count in generated.choices) == 2 * (2 * 7 + 1)
    assert all(choice.level in {level.name for level in LEVELS} for choice, _ in generated.choices)


def test_another_seed_gives_another_image(generated):
    other = generate.generate(replace(REQUEST, seed=1))
    assert other.image.tobytes() != generated.image.tobytes()


def test_image_is_near_that_of_the_stock_pipeline(generated):
    """diffusers' own pipeline in bf16 with 2048 padded slots differs by quantization noise only."""
    stock = models.tiny_pipeline()
    stock.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_inference_steps": 2, "std": 1.5, "guidance_schedule": [7.0, 3.0]}
    theirs = stock("a red bicycle", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images[0]
    ours = torch.tensor(list(generated.image.tobytes())).reshape(64, 96, 3).permute(2, 0, 1) / 255
    assert (ours - theirs).abs().mean() < 0.05
    assert theirs.std() > 0.05


def test_mask_has_no_effect_without_padding():
    model = models.get("tiny")
    module = model.build()
    for case in (models.Case(64, 64, text_tokens=9), models.Case(64, 64, branch="uncond")):
        torch.manual_seed(1)
        inputs = model.inputs(module, case)
        with torch.no_grad():
            masked = module(**inputs).sample
            bare = copy.deepcopy(module)
            ideogram4.unmask(bare)
            assert torch.equal(bare(**inputs).sample, masked)


def test_local_folder_and_same_seed_give_the_same_image(generated, tmp_path):
    models.tiny_pipeline().save_pretrained(tmp_path / "m")
    again = generate.generate(replace(REQUEST, model=str(tmp_path / "m")))
    assert again.image.tobytes() == generated.image.tobytes()
    generate.save(again, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert '"model": "m"' in image.info["int8kit"]
        assert str(tmp_path) not in str(image.info)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"model": "sdxl"}, UnknownName, "unknown model 'sdxl'; expected tiny"),
        ({"model": "nobody/nothing"}, FileError, "cannot load 'nobody/nothing'"),
        ({"preset": "best"}, UnknownName, "unknown preset 'best'; expected default, quality, turbo"),
        ({"steps": 0}, InputError, "0 steps: expected"),
        ({"width": 100}, InputError, "width 100: expected a positive multiple of 16"),
        ({"gpu": "rtx1"}, UnknownName, "'rtx1'"),
        ({"prompt": "x" * 3000}, InputError, "the prompt has 30[0-9]+ tokens; expected at most 2048; shorten it"),
    ],
)
def test_bad_requests(change, error, reason):
    with pytest.raises(error, match=reason):
        generate.generate(ImageRequest(**{"prompt": "x", "height": 64, "width": 64, "steps": 1, **change}))


def test_folder_without_a_pipeline(tmp_path):
    with pytest.raises(FileError, match=r"it holds no model_index\.json"):
        ideogram4.load(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "Ideogram4Pipeline"}')
    with pytest.raises(FileError, match="as an Ideogram4Pipeline"):
        ideogram4.load(str(tmp_path))


def test_gpu_without_a_database(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "find", lambda alias, given=None: None)
    made = generate.generate(ImageRequest("x", height=64, width=64, steps=1, gpu="rtx3060"))
    assert {choice.level for choice, _ in made.choices} == {DEFAULT}
    assert made.databases == ()


def test_strict_refuses_unproven_configurations(generated, tmp_path):
    nothing = Resources(registers=1, spill_bytes=0, shared_bytes=0)
    entries = [
        Entry(
            m=s.m,
            n=s.n,
            k=s.k,
            source=Source.MODELLED,
            config=default_config(s),
            triton=triton.__version__,
            kernel=gemm.kernel_hash(),
            resources=nothing,
            tried=1,
        )
        for s in {choice.shape for choice, _ in generated.choices}
    ]
    path = tmp_path / "t.json"
    store.update(path, gpus.get("rtx3090"), entries)
    request = replace(REQUEST, steps=1, gpu="rtx3090", database=path, strict=True)
    reason = (
        rf"not proven under Triton {triton.__version__} as sm_86 code .*Run `int8kit verify --gpu rtx3090` on a GPU"
    )
    with pytest.raises(CheckFailed, match=reason):
        generate.generate(request)
    assert len(generate.unproven_of(generate.generate(replace(request, strict=False)).choices)) > 1

    def proven(**change):
        about = {"device": "d", "arch": 86, "kernel": gemm.kernel_hash(), "triton": triton.__version__, **change}
        return {e.key: [stamp("native", entry=e, **about)] for e in entries}

    store.stamp(path, proven(triton="3.6.99"))
    with pytest.raises(CheckFailed, match=reason):
        generate.generate(request)
    store.stamp(path, proven())
    assert generate.unproven_of(generate.generate(request).choices) == []
