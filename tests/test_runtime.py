"""runtime/: image generation on a CPU, and its Ideogram 4 pipeline."""

import json
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
from int8kit.lookup import DEFAULT, LEVELS, Plan
from int8kit.runtime import denoise, generate, ideogram4, memory, png, variants
from int8kit.runtime.generate import ImageRequest
from int8kit.runtime.repairs import Repairs, described
from int8kit.runtime.schedule import PRESETS
from int8kit.spec import Source, default_config


def test_presets_follow_the_authors_schedules():
    assert PRESETS["quality"].guidance(48) == [7.0] * 45 + [3.0] * 3
    assert PRESETS["default"].guidance(20) == [7.0] * 18 + [3.0] * 2
    assert PRESETS["turbo"].guidance(12) == [7.0] * 11 + [3.0]
    assert PRESETS["quality"].guidance(1) == [7.0]
    assert PRESETS["quality"].guidance(4) == [7.0] * 3 + [3.0]


REQUEST = ImageRequest(("a red bicycle",), height=64, width=96, steps=2)


@pytest.fixture(scope="module")
def generated():
    return generate.generate(REQUEST)


def test_image_is_written_with_its_request(generated, tmp_path):
    assert [image.size for image in generated.images] == [(96, 64)]
    assert generated.steps == 2
    assert generated.tokens == (len("<user\na red bicycle<\n<assistant"),)  # bytes, and < for each special token
    times = [value for name, value in vars(generated).items() if name.endswith(("_s", "_ms"))]
    assert len(times) == 9
    assert min(*times, generated.peak_gib) > 0
    assert generated.first_step_s < generated.denoise_s < generated.until_first_step_s + generated.denoise_s
    assert (generated.fused, generated.attention) == (True, "torch on the CPU")
    path = tmp_path / "a.png"
    assert not png.is_ours(path)
    assert png.save(generated, path) == [path]
    assert png.is_ours(path)
    with Image.open(path) as image:
        image.load()
        assert image.size == (96, 64)
        for word in ("a red bicycle", '"seed": 0', '"torch"', '"steps": 2'):
            assert word in image.info["int8kit"]
    assert list(tmp_path.iterdir()) == [path]


def test_choices_are_those_of_the_shapes_that_run(generated):
    image, text = 4 * 6, generated.tokens[0]
    assert {choice.shape.m for choice, _ in generated.choices} == {image, image + text, text}
    assert sum(count for _, count in generated.choices) == 2 * 2 * 4 + 1  # blocks and branches; the text projection
    assert {(c.shape.n, c.shape.k) for c, _ in generated.choices} == {
        (1536, 512), (512, 512), (2048, 512), (512, 1024), (512, 416),
    }  # fmt: skip
    assert all(choice.level in {level.name for level in LEVELS} for choice, _ in generated.choices)


def test_another_seed_gives_another_image(generated):
    other = generate.generate(replace(REQUEST, seed=1))
    assert other.images[0].tobytes() != generated.images[0].tobytes()


def test_image_is_near_that_of_the_stock_pipeline(generated):
    """diffusers' own pipeline in bf16 with 2048 padded slots differs by quantization noise only."""
    stock = models.tiny_pipeline()
    stock.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_inference_steps": 2, "std": 1.5, "guidance_schedule": [7.0, 3.0]}
    theirs = stock("a red bicycle", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images[0]
    ours = torch.tensor(list(generated.images[0].tobytes())).reshape(64, 96, 3).permute(2, 0, 1) / 255
    assert (ours - theirs).abs().mean() < 0.05
    assert theirs.std() > 0.05


def pixels(image):
    return torch.tensor(list(image.tobytes())).float() / 255


def test_prompts_and_images_of_each(generated, tmp_path):
    """Each image of a batch is the one that its prompt and seed give alone, up to rounding."""
    prompts = ("a red bicycle", "a cat that sleeps on a long red sofa")
    request = replace(REQUEST, prompts=prompts, images=2, seed=3)
    batch = generate.generate(request)
    assert len(batch.images) == 4
    assert batch.tokens[0] < batch.tokens[1]
    alone = generate.generate(replace(REQUEST, prompts=prompts[1:], seed=5))
    assert (pixels(batch.images[2]) - pixels(alone.images[0])).abs().mean() < 0.01
    assert (pixels(batch.images[1]) - pixels(alone.images[0])).abs().mean() > 0.02
    paths = png.save(batch, tmp_path / "a.png")
    assert [path.name for path in paths] == ["a.png", "a-2.png", "a-3.png", "a-4.png"]
    with Image.open(paths[2]) as image:
        kept = json.loads(image.info["int8kit"])
    assert (kept["prompt"], kept["seed"], kept["variant"]) == (prompts[1], 5, "int8")
    assert not {"guidance", "compile", "without", "gpu"} & set(kept)  # defaults


def test_a_guidance_of_zero_is_recorded(generated, tmp_path):
    zero = replace(generated, request=replace(REQUEST, guidance=0.0, without=("no-mask",)))
    [path] = png.save(zero, tmp_path / "a.png")
    with Image.open(path) as image:
        kept = json.loads(image.info["int8kit"])
    assert (kept["guidance"], kept["without"], kept["seed"]) == (0.0, ["no-mask"], 0)


@pytest.mark.parametrize("variant", [name for name in variants.VARIANTS if name != "int8"])
def test_variants_give_nearly_the_same_image(generated, variant):
    made = generate.generate(replace(REQUEST, variant=variant))
    assert not made.fused
    assert len(made.choices) == (0 if variant != "unfused" else 3 * 2 + 1)
    assert (pixels(made.images[0]) - pixels(generated.images[0])).abs().mean() < 0.05


def test_each_repair_can_be_off(generated):
    off = tuple(name for name in described() if name != "trim-text")  # 2048 rows of padding take seconds here
    made = generate.generate(replace(REQUEST, without=off))
    assert not made.fused
    assert (pixels(made.images[0]) - pixels(generated.images[0])).abs().mean() < 0.02
    assert generate.repairs_of(made.request) == replace(Repairs.none(), trim_text=True)
    assert generate.repairs_of(replace(REQUEST, without=tuple(described()))) == Repairs.none()


def test_the_loop_is_that_of_the_stock_pipeline():
    """The variant bf16 without a repair that leaves rows out: the latents of diffusers, bit by bit."""
    pipe = models.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_inference_steps": 3, "guidance_schedule": [7.0, 3.0, 1.0]}
    tokens = ideogram4.count_tokens(pipe, "a red bicycle")
    theirs = pipe(
        "a red bicycle", generator=torch.Generator().manual_seed(4), output_type="latent",
        max_sequence_length=tokens, **call
    ).images  # fmt: skip
    device = torch.device("cpu")
    scene = denoise.Scene(ideogram4.encode(pipe, ["a red bicycle"], device), 1, 64, 96)
    noise = denoise.noise(scene, 128, 4, device)

    def latents(repairs):
        scheduler = PRESETS["quality"].schedule(64, 96, 3).scheduler(pipe, device)
        pair = ideogram4.prepare(pipe, "bf16", repairs, lambda n, k: Plan(), device)
        branches = denoise.FusedBranches(*pair, scene, denoise.times(scheduler, torch.bfloat16))
        return denoise.denoise(branches, scheduler, noise, call["guidance_schedule"])

    # torch multiplies one row by another kernel than three, which rounds adaLN otherwise
    assert torch.equal(latents(Repairs.without(["modulation-ahead"])), theirs)
    assert ((latents(Repairs()) - theirs).norm() / theirs.norm()).item() < 0.01


def test_memory_of_weights_that_the_steps_do_not_need(generated, monkeypatch):
    monkeypatch.setattr(memory, "is_short", lambda device, needed: needed > 0)
    released = []
    monkeypatch.setattr(denoise.FusedBranches, "release", lambda self: released.append(self))
    assert generate.generate(REQUEST).images[0].tobytes() == generated.images[0].tobytes()
    assert len(released) == 1


DAMAGES = {
    "step 1: the conditional velocity": lambda pipe: pipe.transformer.layers[0].adaln_modulation.bias,
    "step 1: the unconditional velocity": lambda pipe: pipe.unconditional_transformer.final_layer.linear.weight,
    "the decoded image is not finite; the weights of the VAE": lambda pipe: pipe.vae.decoder.conv_out.weight,
}


@pytest.mark.parametrize("reason", DAMAGES)
@pytest.mark.parametrize("variant", ["int8", "bf16"])
def test_a_damaged_model_makes_no_black_image(monkeypatch, reason, variant):
    """A NaN in a weight that no variant quantizes."""
    pipe = models.tiny_pipeline()
    with torch.no_grad():
        DAMAGES[reason](pipe).view(-1)[3] = torch.nan
    monkeypatch.setattr(models, "tiny_pipeline", lambda: pipe)
    with pytest.raises(CheckFailed, match=f"^{reason}"):
        generate.generate(replace(REQUEST, variant=variant))


def test_latents_that_overflow():
    with pytest.raises(CheckFailed, match="step 1: the latents are not finite; name a smaller --guidance"):
        generate.generate(replace(REQUEST, guidance=3e38))


def test_a_batch_that_no_memory_holds():
    reason = "200000 images of 96x64 at once: they need about .* GiB, and this machine has .*; name fewer --images"
    with pytest.raises(InputError, match=reason):
        generate.generate(replace(REQUEST, images=200_000))


def test_local_folder_and_same_seed_give_the_same_image(generated, tmp_path):
    models.tiny_pipeline().save_pretrained(tmp_path / "m")
    again = generate.generate(replace(REQUEST, model=str(tmp_path / "m")))
    assert again.images[0].tobytes() == generated.images[0].tobytes()
    png.save(again, tmp_path / "a.png")
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
        ({"images": 0}, InputError, "1 prompts, 0 images of each: expected at least 1"),
        ({"prompts": ()}, InputError, "0 prompts, 1 images of each: expected at least 1"),
        (
            {"variant": "int4"},
            UnknownName,
            "unknown variant 'int4'; expected bf16, fake-quant, fp8, int8, nf4, unfused",
        ),
        ({"without": ("masks",)}, UnknownName, "unknown repair 'masks'; expected .*no-mask"),
        ({"compile": True}, InputError, "compile: the fused INT8 blocks gain nothing from it"),
        ({"prompts": ("x" * 3000,)}, InputError, "the prompt has 30[0-9]+ tokens; expected at most 2048; shorten it"),
    ],
)
def test_bad_requests(change, error, reason):
    with pytest.raises(error, match=reason):
        generate.generate(ImageRequest(**{"prompts": ("x",), "height": 64, "width": 64, "steps": 1, **change}))


def test_folder_without_a_pipeline(tmp_path):
    with pytest.raises(FileError, match=r"it holds no model_index\.json"):
        ideogram4.load(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "Ideogram4Pipeline"}')
    with pytest.raises(FileError, match="as an Ideogram4Pipeline"):
        ideogram4.load(str(tmp_path))


def test_gpu_without_a_database(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "find", lambda alias, given=None: None)
    made = generate.generate(ImageRequest(("x",), height=64, width=64, steps=1, gpu="rtx3060"))
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
