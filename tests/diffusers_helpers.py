"""Folders of tiny models, and comparisons of models, for the tests of the integrations."""

import json
import shutil

import torch
from diffusers import Ideogram4Transformer2DModel
from safetensors.torch import load_file, save_file

from int8kit import Int8Linear, models

LAYER = "layers.1.attention.to_q"
WEIGHT, SCALE = f"{LAYER}.weight", f"{LAYER}.weight_scale"


def save_tiny(folder):
    """Save the tiny transformer in `folder` -> folder."""
    models.tiny_pipeline().transformer.save_pretrained(folder)
    return folder


def load(folder, **settings):
    return Ideogram4Transformer2DModel.from_pretrained(folder, **settings)


def tensors_of(folder):
    [path] = folder.glob("*.safetensors")
    return load_file(path)


def changed(folder, target, change, name="diffusion_pytorch_model"):
    """A copy of a model's folder whose tensors `change` has edited in place, or replaced."""
    shutil.copytree(folder, target)
    [path] = target.glob("*.safetensors")
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return target


def sharded(folder, target, parts):
    """A copy of a model's folder whose tensors are in several files."""
    shutil.copytree(folder, target, ignore=lambda *_: ["diffusion_pytorch_model.safetensors"])
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for name, tensors in zip(names, parts, strict=True):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / name, {"format": "pt"})
    weight_map = {key: name for name, tensors in zip(names, parts, strict=True) for key in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return target


def assert_equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype is not b[name].dtype or not torch.equal(a[name], b[name])] == []


def output(transformer):
    torch.manual_seed(0)
    inputs = models.get("tiny").inputs(transformer, models.Case(64, 64, text_tokens=9))
    with torch.no_grad():
        return transformer(**inputs).sample


def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "guidance_schedule": [3.0], "max_sequence_length": 32, "output_type": "pt"}
    return pipe("a cat", height=32, width=32, generator=torch.Generator().manual_seed(0), **settings).images


def int8_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def assert_one_line(caught):
    assert "\n" not in str(caught.value)
