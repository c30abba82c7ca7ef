"""Pipelines, loaders, LoRA, offloading and found configurations on GPUs."""

import concurrent.futures
import copy
import warnings

import accelerate
import pytest
import torch
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from test_lora import equal, file_of, tensors
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import int8kit
from int8kit import Int8Linear, NotTuned, gpus, models, optimize, quantize_, restore
from int8kit.database import store
from int8kit.errors import ShapeError, UnknownName
from int8kit.integrations.diffusers import Int8KitConfig
from int8kit.runtime import fuse

BRANCHES = ("transformer", "unconditional_transformer")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")


def latents(pipe, size=32, steps=2, **options):
    settings = {
        "height": size, "width": size, "num_inference_steps": steps, "guidance_schedule": [7.0] * steps,
        "output_type": "latent", "max_sequence_length": 32, "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipe("a red bicycle", **{**settings, **options}).images.cpu()


@pytest.fixture(scope="module")
def stock():
    return models.tiny_pipeline()


@pytest.fixture
def cpu_pipe(stock):
    pipe = type(stock)(**{**stock.components, **{name: copy.deepcopy(getattr(stock, name)) for name in BRANCHES}})
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    pipe.remove_all_hooks()
    stock.to("cpu")  # the parts that the pipelines share


@pytest.fixture
def pipe(cpu_pipe):
    return cpu_pipe.to("cuda")


def test_optimize_and_restore(pipe):
    before = latents(pipe)
    optimize(pipe, keep_float="cpu")
    after = latents(pipe)
    assert 0 < (after - before).norm() / before.norm() < 0.1
    assert torch.equal(latents(pipe), after)
    assert latents(pipe, size=64, num_images_per_prompt=2).shape == (2, 16, 128)
    restore(pipe)
    assert torch.equal(latents(pipe), before)


def test_weights_have_the_bits_of_the_cpu(cpu_pipe):
    optimize(cpu_pipe)
    on_cpu = tensors(cpu_pipe.transformer)
    on_gpu = copy.deepcopy(models.tiny_pipeline().transformer).cuda()
    quantize_(on_gpu)
    assert equal({name: tensor.cpu() for name, tensor in tensors(on_gpu).items()}, on_cpu)


def offload(model, kind):
    """The hooks of `pipe.enable_model_cpu_offload` and its kin, for a denoiser alone.

    The pipeline calls parts of its text encoder. Under the first hook it runs on the CPU then, with other bits, and
    under the second it fails, in diffusers 0.42.1 with or without INT8.
    """
    model.to("cpu")
    if kind == "model":
        accelerate.cpu_offload_with_hook(model, execution_device="cuda")
    elif kind == "sequential":
        accelerate.cpu_offload(model, execution_device=torch.device("cuda"))
    else:
        model.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level",
            use_stream=kind.endswith("stream"),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["model", "sequential", "group", "group with a stream"])
@pytest.mark.filterwarnings("ignore::int8kit.runtime.fuse.NotFused")
def test_offloading_gives_the_same_latents(pipe, kind):
    optimize(pipe)
    if kind != "model":  # hooks of layers need the layers' own forward
        for name in BRANCHES:
            fuse.undo(getattr(pipe, name))
    want = latents(pipe)
    for name in BRANCHES:
        fuse.fuse(getattr(pipe, name))
    for name in BRANCHES:
        offload(getattr(pipe, name), kind)
    for _ in range(2):
        assert torch.equal(latents(pipe), want)
    where = pipe.transformer.layers[0].attention.to_q.weight.device.type
    assert where == {"model": "cuda", "sequential": "meta"}.get(kind, "cpu")  # the next model's turn frees the first


def test_sequential_offload_of_the_pipeline_fails_without_int8_too():
    pipe = models.tiny_pipeline()
    pipe.enable_sequential_cpu_offload()
    with pytest.raises(NotImplementedError, match="meta tensor"):
        latents(pipe)


def test_the_order_of_optimize_and_model_offload(cpu_pipe):
    optimize(cpu_pipe)
    cpu_pipe.enable_model_cpu_offload()
    want = latents(cpu_pipe)
    later = models.tiny_pipeline()
    later.set_progress_bar_config(disable=True)
    later.enable_model_cpu_offload()
    optimize(later)
    assert torch.equal(latents(later), want)


def test_model_offloading_before_optimize(cpu_pipe):
    cpu_pipe.enable_model_cpu_offload()
    before = latents(cpu_pipe)
    optimize(cpu_pipe, keep_float="cpu")
    assert not torch.equal(latents(cpu_pipe), before)
    restore(cpu_pipe)
    assert torch.equal(latents(cpu_pipe), before)


def test_sequential_offloading_leaves_no_weight_on_the_gpu():
    def held(int8):
        model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False).bfloat16() for _ in range(16)))
        if int8:
            quantize_(model)
            assert all(isinstance(layer, Int8Linear) for layer in model)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        accelerate.cpu_offload(model, execution_device=torch.device("cuda", 0))
        with torch.no_grad():
            model(torch.randn(4, 2048, dtype=torch.bfloat16))
        return torch.cuda.memory_allocated() - before

    held(False), held(True)  # libraries allocate workspaces at their first call
    assert held(False) < 2**21
    assert held(True) < 2**21  # the weights have 64 MiB


def test_a_wrong_device_leaves_the_gpu_usable(pipe):
    optimize(pipe)
    layer = pipe.transformer.layers[0].attention.to_q
    x = torch.randn(20, layer.in_features, dtype=torch.bfloat16)
    want = layer(x.cuda())
    half = copy.deepcopy(layer)
    half.weight_scale = half.weight_scale.cpu()
    for wrong, given in ((layer, x), (copy.deepcopy(layer).cpu(), x.cuda()), (half, x.cuda())):
        with pytest.raises(ShapeError, match="expected one device"):
            wrong(given)
    torch.cuda.synchronize()
    assert torch.equal(layer(x.cuda()), want)


def test_a_lora_is_loaded_fused_and_taken_away(pipe):
    optimize(pipe)
    before, clean = latents(pipe), tensors(pipe.transformer)
    pipe.load_lora_weights(file_of(pipe.transformer), adapter_name="x")
    beside = latents(pipe)
    assert not torch.equal(beside, before)
    pipe.disable_lora()
    assert torch.equal(latents(pipe), before)
    pipe.enable_lora()
    pipe.fuse_lora(safe_fusing=True)
    fused = latents(pipe)
    assert 0 < (fused - beside).norm() < 0.1 * (beside - before).norm()
    pipe.unfuse_lora()
    assert torch.equal(latents(pipe), beside)
    pipe.unload_lora_weights()
    assert equal(tensors(pipe.transformer), clean)
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize("kind", ["model", "group", "group with a stream"])
@pytest.mark.filterwarnings("ignore::int8kit.runtime.fuse.NotFused")
def test_a_lora_beside_offloading(cpu_pipe, kind):
    optimize(cpu_pipe)
    state = file_of(cpu_pipe.transformer)
    if kind == "model":  # diffusers takes the hooks away for the load, and enables them again for the whole pipeline
        cpu_pipe.enable_model_cpu_offload()
    else:
        cpu_pipe.to("cuda")
        offload(cpu_pipe.transformer, kind)
    before = latents(cpu_pipe)
    cpu_pipe.load_lora_weights(state, adapter_name="x")
    beside = latents(cpu_pipe)
    assert 0.01 < (beside - before).norm() / before.norm() < 1
    cpu_pipe.disable_lora()
    assert torch.equal(latents(cpu_pipe), before)
    cpu_pipe.enable_lora()
    assert torch.equal(latents(cpu_pipe), beside)
    cpu_pipe.unload_lora_weights()
    assert torch.equal(latents(cpu_pipe), before)


def test_loading_to_the_gpu_gives_the_bits_of_the_cpu(pipeline_folder, tmp_path):
    folder = pipeline_folder / "transformer"
    config = Int8KitConfig()
    on_cpu = Ideogram4Transformer2DModel.from_pretrained(folder, quantization_config=config)
    on_gpu = Ideogram4Transformer2DModel.from_pretrained(folder, quantization_config=config, device_map="cuda")
    assert on_gpu.layers[0].attention.to_q.weight.is_cuda
    assert equal({name: tensor.cpu() for name, tensor in tensors(on_gpu).items()}, tensors(on_cpu))
    on_gpu.save_pretrained(tmp_path)
    again = Ideogram4Transformer2DModel.from_pretrained(tmp_path, device_map="cuda")
    assert equal(tensors(again), tensors(on_gpu))


def test_a_pipeline_round_trip_on_the_gpu(pipeline_folder, tmp_path):
    pipe = Ideogram4Pipeline.from_pretrained(
        pipeline_folder, quantization_config=int8kit.pipeline_config(), dtype=torch.bfloat16, device_map="cuda"
    )
    want = latents(pipe)
    pipe.save_pretrained(tmp_path)
    again = Ideogram4Pipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cuda")
    assert torch.equal(latents(again), want)


@two_gpus
def test_a_pipeline_over_two_gpus(pipeline_folder):
    """Components on different GPUs: the present GPU is not that of each denoiser."""
    settings = {"quantization_config": int8kit.pipeline_config(), "dtype": torch.bfloat16}
    pipe = Ideogram4Pipeline.from_pretrained(pipeline_folder, device_map="balanced", **settings)
    assert {component.device.index for name, component in pipe.components.items() if name in BRANCHES} <= {0, 1}
    whole = Ideogram4Pipeline.from_pretrained(pipeline_folder, device_map="cuda", **settings)
    assert torch.equal(latents(pipe), latents(whole))


def test_a_text_encoder_on_the_gpu(tmp_path):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}
    settings = Qwen3Config(hidden_size=256, num_hidden_layers=2, intermediate_size=512, vocab_size=96, **heads)
    Qwen3ForCausalLM(settings).bfloat16().save_pretrained(tmp_path / "float")
    loaded = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=Int8KitConfig(), device_map=place)
        for place in ("cpu", "cuda")
    ]
    assert equal({name: tensor.cpu() for name, tensor in tensors(loaded[1]).items()}, tensors(loaded[0]))
    loaded[1].save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", device_map="cuda")
    tokens = torch.arange(9, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, loaded[1](tokens).logits)


def test_the_denoiser_compiles(pipe):
    """torch.compile traces the stock forward with INT8 layers; the fused one is fast without it."""
    optimize(pipe)
    for model in (pipe.transformer, pipe.unconditional_transformer):
        fuse.undo(model)
    want = latents(pipe)
    for model in (pipe.transformer, pipe.unconditional_transformer):
        fuse.fuse(model)
    pipe.transformer.compile(fullgraph=True, backend="aot_eager")
    pipe.unconditional_transformer.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(latents(pipe), want)


@pytest.fixture
def nothing_found():
    store.forget_plans()
    yield
    store.forget_plans()


def test_a_layer_finds_the_configurations_of_its_gpu(nothing_found):
    alias = gpus.present().alias
    if store.find(alias) is None:
        pytest.skip(f"{alias} has no database")
    entry = next(e for e in int8kit.load_database(alias).entries if e.shape.m >= 4096)
    layer = Int8Linear.from_linear(torch.nn.Linear(entry.shape.k, entry.shape.n, bias=False, device="cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotTuned)
        layer(torch.randn(entry.shape.m, entry.shape.k, device="cuda", dtype=torch.bfloat16))
    candidates = store.found_plan(0, entry.shape.n, entry.shape.k).candidates
    assert any((one.shape, one.config) == (entry.shape, entry.config) for one in candidates)
    assert str(entry.shape) in repr(layer)


def test_the_first_untuned_layer_says_so_once(nothing_found):
    layers = [Int8Linear.from_linear(torch.nn.Linear(48, n, device="cuda")) for n in (16, 32)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NotTuned)
        for layer in (*layers, *layers):
            layer(torch.randn(3, 48, device="cuda", dtype=torch.bfloat16))
    [warning] = [w for w in caught if w.category is NotTuned]
    assert "int8kit tune --shape" in str(warning.message)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_threads_share_a_layer(where):
    layer = Int8Linear.from_linear(torch.nn.Linear(416, 512)).to(where)
    inputs = [torch.randn(rows, 416).to(where) for rows in range(1, 33)]
    want = [layer(x) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(map(torch.equal, pool.map(layer, inputs), want))


@two_gpus
def test_layers_on_two_gpus():
    """The current device is not that of the operands."""
    layer = Int8Linear.from_linear(torch.nn.Linear(416, 512))
    x = torch.randn(64, 416, dtype=torch.bfloat16)
    results = []
    for index in (1, 0, 1):
        there = copy.deepcopy(layer).to(f"cuda:{index}")
        results.append(there(x.to(f"cuda:{index}")))
        assert results[-1].device.index == index
        assert torch.cuda.current_device() == 0
    assert all(torch.equal(result.cpu(), results[0].cpu()) for result in results)
    with pytest.raises(ShapeError, match="x on cuda:0, wq on cuda:1"):
        there(x.to("cuda:0"))


@two_gpus
def test_a_model_over_two_gpus(pipeline_folder):
    folder = pipeline_folder / "transformer"
    whole = Ideogram4Transformer2DModel.from_pretrained(folder, quantization_config=Int8KitConfig(), device_map="cuda")
    names = [name for name, _ in whole.named_children()]
    places = {name: 0 for name in names if name != "layers"} | {"layers.0": 0, "layers.1": 1}
    split = Ideogram4Transformer2DModel.from_pretrained(folder, quantization_config=Int8KitConfig(), device_map=places)
    assert split.layers[1].attention.to_q.weight.device.index == 1
    pipe = models.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.register_modules(transformer=whole)
    pipe.text_encoder.to("cuda"), pipe.vae.to("cuda"), pipe.unconditional_transformer.to("cuda")
    want = latents(pipe)
    pipe.register_modules(transformer=split)
    assert torch.equal(latents(pipe), want)


@two_gpus
def test_gradients_over_two_gpus():
    first = Int8Linear.from_linear(torch.nn.Linear(416, 512)).to("cuda:0")
    second = Int8Linear.from_linear(torch.nn.Linear(512, 64)).to("cuda:1")
    x = torch.randn(5, 416, device="cuda:0", requires_grad=True)
    second(first(x).to("cuda:1")).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.device.index == 0


@pytest.mark.parametrize("fits", [True, False])
def test_weights_are_quantized_on_another_device_or_wait_there(monkeypatch, fits):
    """device: the INT8 model is there. Without it, a GPU whose memory is short lets finished layers wait on the CPU."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 256))
    expected = copy.deepcopy(model)
    quantize_(expected)
    if fits:
        quantize_(model, device="cuda")
    else:
        model.cuda()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**30))
        torch.cuda.empty_cache()
        quantize_(model)
    assert model[1].weight.is_cuda
    assert equal({name: tensor.cpu() for name, tensor in tensors(model).items()}, tensors(expected))


def test_a_gpu_that_is_unknown_is_one_error():
    with pytest.raises(UnknownName, match="rtx3090"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(256, 256)), gpu="rtx9999")
