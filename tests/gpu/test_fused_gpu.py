"""The fused forward of Ideogram 4 on a GPU: against the CPU, as CUDA graphs, with LoRAs, and in every variant."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from test_fused_ideogram4 import CASES, distance, inputs_of, of_fused, of_stock
from test_lora import file_of

from int8kit import models, optimize, quantize_
from int8kit.integrations import lora
from int8kit.lookup import Plan
from int8kit.runtime import attention, denoise, generate, ideogram4, variants
from int8kit.runtime.fused_ideogram4 import FusedIdeogram4
from int8kit.runtime.repairs import Repairs, described
from int8kit.runtime.schedule import PRESETS

DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def stock():
    return models.tiny_pipeline().transformer


@pytest.fixture(scope="module")
def int8(stock):
    made = copy.deepcopy(stock)
    quantize_(made)
    return made


def on_gpu(given):
    return {name: tensor.to(DEVICE) for name, tensor in given.items()}


@pytest.mark.parametrize("case", CASES)
def test_as_near_to_the_truth_as_on_a_cpu(stock, int8, case):
    given = inputs_of(stock, CASES[case])
    truth = of_stock(copy.deepcopy(stock).float(), inputs_of(stock, CASES[case], torch.float32))
    unfused = distance(of_stock(int8, given), truth)
    made = of_fused(copy.deepcopy(int8).to(DEVICE), on_gpu(given))
    assert distance(made.cpu(), truth) < 1.1 * unfused


@pytest.mark.parametrize("off", described())
def test_each_repair_off(stock, int8, off):
    given = on_gpu(inputs_of(int8, CASES["padded batch"]))
    model = copy.deepcopy(int8).to(DEVICE)
    truth = of_stock(copy.deepcopy(stock).float(), inputs_of(stock, CASES["padded batch"], torch.float32))
    floor = distance(of_stock(copy.deepcopy(stock).to(DEVICE), given).cpu(), truth)
    apart = distance(of_fused(model, given, Repairs.without([off])), of_fused(model, given))
    assert apart < 1.5 * floor


def branches_of(model, graphs, texts=(20, 7), steps=4):
    torch.manual_seed(0)
    features = tuple(torch.randn(n, 416, device=DEVICE).bfloat16() for n in texts)
    scene = denoise.Scene(features, 1, 64, 96)
    times = torch.linspace(0.1, 0.9, steps, device=DEVICE).bfloat16()
    pair = [FusedIdeogram4(model) for _ in range(2)]
    return scene, denoise.FusedBranches(*pair, scene, times, graphs=graphs)


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_graphs_keep_the_bits(stock, variant):
    """Other latents and another time at each step, prompts of several lengths."""
    model = copy.deepcopy(stock).to(DEVICE)
    if reason := variants.why_not(variant, DEVICE, None):
        pytest.skip(reason)
    variants.convert(model, variant, models.get("tiny").quantizes, lambda n, k: Plan(), DEVICE)
    scene, eager = branches_of(model, graphs=False)
    _, graphed = branches_of(model, graphs=True)
    latents = denoise.noise(scene, 128, 0, DEVICE)
    for step in range(4):
        want, made = eager.velocities(latents, step), graphed.velocities(latents, step)
        assert all(map(torch.equal, made, want))
        latents = latents + 0.1 * made[0]
    assert graphed.graphs
    assert graphed.release() > 0  # and the steps go on
    assert torch.equal(graphed.conditional(latents, 3), eager.conditional(latents, 3))


def test_a_hook_runs_at_each_step(stock):
    """A graph would leave it out."""
    model = copy.deepcopy(stock).to(DEVICE)
    calls = []
    model.layers[0].feed_forward.w2.register_forward_hook(lambda *args: calls.append(1))
    scene, branches = branches_of(model, graphs=True)
    assert not branches.graphs
    latents = denoise.noise(scene, 128, 0, DEVICE)
    for _ in range(3):
        branches.velocities(latents, 1)
    assert len(calls) == 6


def test_attention_without_a_mask():
    """Runs of several lengths, by the back end of this GPU, against one problem with a mask."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 100, 512, device=DEVICE).bfloat16()
    with attention.backend(DEVICE):
        out = attention.attend(q, k, v, (60, 40), 2)
    want = attention.attend(q.float(), k.float(), v.float(), (60, 40), 2, 1)
    assert distance(out, want) < 0.004
    assert attention.name_of(DEVICE) in ("cudnn", "flash")


def test_other_attention_keeps_torchs_order():
    """In a new process, whether the first attention is ours or not."""
    script = """
import sys, torch
from int8kit.runtime import attention
q = torch.zeros(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
if sys.argv[1] == "ours":
    with attention.backend(q.device):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
torch.nn.functional.scaled_dot_product_attention(q, q, q)
print(torch._C._get_sdp_priority_order())
"""
    orders = {
        subprocess.run([sys.executable, "-c", script, first], capture_output=True, text=True, check=True).stdout
        for first in ("ours", "torch's")
    }
    assert len(orders) == 1


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("target", ["attention.to_q", "attention.to_out.0", "feed_forward.w1", "feed_forward.w2"])
def test_a_lora_in_the_fused_forward(int8, target):
    """Beside the fused forward as beside the unfused one, and nothing is left when it is off."""
    model = copy.deepcopy(int8).to(DEVICE)
    given = on_gpu(inputs_of(int8, CASES["tight"]))
    before = of_fused(model, given)
    lora.prepare_model(model)
    model.load_lora_adapter(file_of(model, [f"layers.{i}.{target}" for i in range(2)]), adapter_name="x")
    made = of_fused(model, given)
    assert distance(made, before) > 0.01
    assert distance(made, of_stock(model, given)) < 0.01
    model.disable_lora()
    assert torch.equal(of_fused(model, given), before)


def test_a_pipeline_and_the_loop_agree():
    """`optimize` in diffusers' loop and `run`'s own loop: the same fused blocks."""
    pipe = models.tiny_pipeline().to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="no entry of .* is near")
        optimize(pipe, gpu="rtx3090")
    tokens = ideogram4.count_tokens(pipe, "a red bicycle")
    theirs = pipe(
        "a red bicycle", height=64, width=96, num_inference_steps=3, guidance_schedule=[7.0, 7.0, 3.0],
        output_type="latent", max_sequence_length=tokens, generator=torch.Generator(DEVICE).manual_seed(0),
    ).images  # fmt: skip
    scene = denoise.Scene(ideogram4.encode(pipe, ["a red bicycle"], DEVICE), 1, 64, 96)
    scheduler = PRESETS["quality"].schedule(64, 96, 3).scheduler(pipe, DEVICE)
    pair = [FusedIdeogram4(getattr(pipe, part)) for part in ideogram4.BRANCHES.values()]
    branches = denoise.FusedBranches(*pair, scene, denoise.times(scheduler, torch.bfloat16))
    noise = denoise.noise(scene, 128, 0, DEVICE)
    ours = denoise.denoise(branches, scheduler, noise, [7.0, 7.0, 3.0])
    assert branches.graphs
    assert distance(ours, theirs) < 0.01


def test_an_image_in_bf16_and_int8():
    made = {}
    for variant in ("bf16", "int8"):
        request = generate.ImageRequest(("a red bicycle", "a cat"), height=64, width=96, steps=3, variant=variant)
        made[variant] = generate.generate(request)
        assert made[variant].graphs
    assert (made["int8"].fused, made["bf16"].fused) == (True, False)
    one, other = (torch.tensor(list(made[v].images[1].tobytes())).float() / 255 for v in made)
    assert (one - other).abs().mean() < 0.05
