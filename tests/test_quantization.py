"""quantize_ and replace_linears: which linears, all or none, and everything that was attached to them stays."""

import copy
import re

import pytest
import torch
from torch import nn

import int8kit
from int8kit import InputError, Int8Linear, Policy, ShapeError, UnknownName, models, quantize_, replace_linears

EVERY = Policy(smallest=1, multiple=1, few_rows=None, inner_only=False)


def everything(module):
    return replace_linears(module, lambda name: True)


def linears(module):
    return [name for name, child in module.named_modules() if type(child) is nn.Linear]


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


class Block(nn.Module):
    def __init__(self, width=256):
        super().__init__()
        self.norm1 = nn.Module()
        self.norm1.linear = nn.Linear(width, 2 * width)
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.to_q = nn.Linear(width, width)
        self.gate_proj = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(width, 8)
        self.odd = nn.Linear(width, 257)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_in = nn.Linear(256, 256)
        self.time_embed = nn.Sequential(nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 256))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(256, 256)


def test_the_default_policy_takes_large_linears_inside_blocks():
    model = Transformer()
    report = quantize_(model)
    assert list(report.replaced) == [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("to_q", "gate_proj")]
    assert all(model.get_submodule(name) is layer for name, layer in report.replaced.items())
    assert all(isinstance(layer, Int8Linear) for layer in report.replaced.values())
    assert report.left == {
        "x_in": "outside the repeated blocks: a first or last projection",
        "time_embed.0": "few rows: 'time_embed' names an embedder or a modulation",
        "time_embed.2": "few rows: 'time_embed' names an embedder or a modulation",
        **{
            f"blocks.{i}.{leaf}": reason
            for i in (0, 1)
            for leaf, reason in {
                "norm1.linear": "few rows: 'norm1' names an embedder or a modulation",
                "img_mod.1": "few rows: 'img_mod' names an embedder or a modulation",
                "narrow": "[8, 256] is small: below 256",
                "odd": "[257, 256]: no fast kernel, since one is no multiple of 16",
            }.items()
        },
        "proj_out": "outside the repeated blocks: a first or last projection",
    }
    first, *rows = str(report).splitlines()
    assert first == "4 of 16 linears run in INT8"
    assert len(rows) == 16
    assert re.search(r"int8  blocks\.0\.to_q +\[256, 256\]", str(report))
    assert re.search(r"left  blocks\.1\.narrow +\[8, 256\] is small", str(report))
    again = quantize_(model)
    assert again.replaced == {}
    assert again.left["blocks.0.to_q"] == "it is INT8 already"


def test_without_repeated_blocks_every_large_linear_is_taken():
    model = nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256))
    assert list(quantize_(model).replaced) == ["0", "2"]


def test_a_list_of_one_block_counts_where_others_have_more():
    model = nn.ModuleDict({"mid": nn.ModuleList([Block()]), "in": nn.Linear(256, 256)})
    assert list(quantize_(model, Policy(skip=["*.gate_proj"])).replaced) == ["mid.0.to_q", "in"]
    model = nn.ModuleDict({"mid": nn.ModuleList([Block()]), "down": nn.ModuleList([Block(), Block()])})
    model["in"] = nn.Linear(256, 256)
    report = quantize_(model, Policy(skip=["*.gate_proj"]))
    assert list(report.replaced) == ["mid.0.to_q", "down.0.to_q", "down.1.to_q"]


def test_a_known_family_has_its_own_policy():
    model = models.get("tiny")
    by_policy, by_model = model.build(), model.build()
    wrapped = nn.Module()
    wrapped.transformer = by_policy
    report = quantize_(wrapped)
    expected = replace_linears(by_model, model.quantizes)
    assert list(report.replaced) == [f"transformer.{name}" for name in expected]
    assert set(report.left.values()) == {"the policy of ideogram4 leaves it"}


@pytest.mark.parametrize(
    ("policy", "replaced"),
    [
        (Policy(skip=["blocks.0"]), ["blocks.1.to_q", "blocks.1.gate_proj"]),
        (Policy(skip=["*.gate_proj"], force=["x_in", "blocks.1.odd"]), ["x_in", "blocks.0.to_q", "blocks.1.to_q",
                                                                        "blocks.1.odd"]),
        (["blocks.*.to_q", "proj_out"], ["blocks.0.to_q", "blocks.1.to_q", "proj_out"]),
        ("time_embed", ["time_embed.0", "time_embed.2"]),
        (lambda name, linear: linear.out_features == 8, ["blocks.0.narrow", "blocks.1.narrow"]),
        (lambda name, linear: True if name == "x_in" else None if name.startswith("blocks.0") else "mine",
         ["x_in", "blocks.0.to_q", "blocks.0.gate_proj"]),
    ],
)  # fmt: skip
def test_policies(policy, replaced):
    report = quantize_(Transformer(), policy)
    assert list(report.replaced) == replaced
    assert len(report.left) == 16 - len(replaced)
    if callable(policy) and "x_in" in replaced:
        assert report.left["proj_out"] == "mine"


@pytest.mark.parametrize("policy", [Policy(skip=["blok.*"]), Policy(force=["blok.*"]), ["to_q", "blok.*"], "blok.*"])
def test_a_pattern_without_a_match_is_refused(policy):
    with pytest.raises(InputError, match="matches no linear"):
        quantize_(Transformer(), policy)


def test_bad_arguments_are_refused_in_one_line():
    with pytest.raises(InputError, match=r"itself a linear.*Int8Linear\.from_linear"):
        quantize_(nn.Linear(256, 256))
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module"):
        quantize_({"transformer": Transformer()})
    model = Transformer()
    with pytest.raises(UnknownName, match="rtx9"):
        quantize_(model, gpu="rtx9")
    assert len(linears(model)) == 16
    assert everything(nn.Linear(64, 64)) == {}  # it holds no linear


def test_gpu_names_the_database():
    model = nn.Sequential(nn.Linear(4608, 256), nn.Linear(256, 256))
    report = quantize_(model, gpu="h200")
    plans = int8kit.load_plans("h200")
    assert report.replaced["0"].plan == plans(256, 4608)
    assert quantize_(nn.Sequential(nn.Linear(256, 256))).replaced["0"].plan is None


@pytest.mark.parametrize("quantize", [everything, lambda model: quantize_(model, EVERY)])
def test_all_or_nothing(quantize):
    def unchanged(model, error, *words):
        before, state = linears(model), dict(model.state_dict())
        with pytest.raises(error) as caught:
            quantize(model)
        assert all(word in str(caught.value) for word in words), caught.value
        assert "\n" not in str(caught.value)
        assert linears(model) == before
        assert list(model.state_dict()) == list(state)
        assert all(value is state[name] or torch.equal(value, state[name]) or value.isnan().any()
                   for name, value in model.state_dict().items() if not value.is_meta)  # fmt: skip

    unchanged(nn.Sequential(nn.Linear(8, 8), nn.Linear(131072, 2)), ShapeError, "'1': ", "131072")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[3, 3] = torch.nan
    unchanged(model, InputError, "'1': 1 of 8 rows", "NaN")
    model[1].weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    unchanged(model, InputError, "'1': ", "uint8")
    model = nn.Sequential(nn.Linear(8, 8), *(nn.Linear(8, 8, device="meta") for _ in range(5)))
    unchanged(model, InputError, "'1', '2', '3' and 2 more", "meta")


def test_a_failing_plan_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    def plan(n, k):
        if n == 4:
            raise KeyError("no plan")
        return int8kit.Plan()

    with pytest.raises(KeyError):
        replace_linears(model, lambda name: True, plan)
    assert linears(model) == ["0", "1"]


def test_every_use_of_a_shared_module_is_replaced():
    linear = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": nn.ModuleList([linear, linear]), "b": nn.Sequential(linear)})
    done = everything(model)
    assert list(done) == ["a.0", "a.1", "b.0"]
    assert model["a"][0] is model["a"][1] is model["b"][0] is done["b.0"]
    assert isinstance(done["b.0"], Int8Linear)


def test_tied_weights_stay_tied_or_stay():
    first, second = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)
    second.weight = first.weight
    done = everything(nn.Sequential(first, second))
    assert done["0"].weight is done["1"].weight
    assert done["0"].bias is not None
    assert done["1"].bias is None
    x = torch.randn(2, 64)
    assert torch.equal(done["1"](x), Int8Linear.from_linear(second)(x))

    model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "head": nn.Linear(64, 32), "other": nn.Linear(64, 32)})
    model["head"].weight = model["embed"].weight
    report = quantize_(model, EVERY)
    assert list(report.replaced) == ["other"]
    assert report.left == {"head": "its weight is also the weight of 'embed'"}

    first.weight = second.weight
    report = quantize_(nn.Sequential(first, second), ["1"])
    assert report.left == {"0": "no pattern of the policy matches", "1": "its weight is also the weight of '0'"}


def test_hooks_mode_and_attributes_stay():
    model, seen = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval(), []
    model[1].train()
    handle = model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_forward_hook(lambda module, args, kwargs, y: y + 1, with_kwargs=True)
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].tag = "mine"
    plain = Int8Linear.from_linear(model[0])
    everything(model)
    x = torch.randn(2, 64)
    assert torch.equal(model[0](x), plain(x) + 1)
    assert seen == ["before", "after"]
    handle.remove()  # the handle of the former layer
    model[0](x)
    assert seen == ["before", "after", "before"]
    assert model[0].tag == "mine"
    assert [layer.training for layer in model] == [False, True]


def test_tensors_of_a_hook_stay():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].register_parameter("gain", nn.Parameter(torch.tensor(3.0)))
    model[0].register_buffer("shift", torch.tensor(2.0), persistent=False)
    model[0].register_forward_hook(lambda module, _, y: module.gain * y + module.shift)
    plain = Int8Linear.from_linear(model[0])
    everything(model)
    x = torch.randn(2, 64)
    assert torch.equal(model(x), 3 * plain(x) + 2)
    assert sorted(model.state_dict()) == ["0.bias", "0.gain", "0.weight", "0.weight_scale"]


def test_a_compiled_linear_runs_the_new_forward():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].compile(backend="eager")
    expected = Int8Linear.from_linear(model[0])
    everything(model)
    x = torch.randn(2, 64)
    assert torch.equal(model(x), expected(x))


def test_the_hook_of_accelerate_stays():
    hooks = pytest.importorskip("accelerate.hooks")

    class Counted(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            assert isinstance(module, Int8Linear)
            return args, kwargs

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    hook = Counted()
    hooks.add_hook_to_module(model[0], hook)
    hooks.add_hook_to_module(model[1], hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    layers = [Int8Linear.from_linear(layer) for layer in model]
    everything(model)
    x = torch.randn(2, 64)
    assert torch.equal(model(x), layers[1](layers[0](x)))
    assert hook.calls == 1
    hooks.remove_hook_from_module(model[0])
    assert torch.equal(model[0](x), layers[0](x))
    assert hook.calls == 1


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(64, 64))
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(InputError, match=r"'0' are on the device meta; .* before offloading"):
        everything(model)


def test_linears_that_are_more_stay():
    x = torch.randn(2, 3, 64)
    model = nn.ModuleDict(
        {
            "halved": Halved(64, 64),
            "attention": nn.MultiheadAttention(64, 2),
            "encoder": nn.TransformerEncoderLayer(64, 2, 64, batch_first=True).eval(),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            "lazy": nn.LazyLinear(64),
            "plain": nn.Linear(64, 64),
        }
    )
    before = copy.deepcopy(model)
    report = quantize_(model, EVERY)
    assert list(report.replaced) == ["plain"]
    assert list(report.left) == [
        "halved", "attention.out_proj", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2", "normed",
        "lazy",
    ]  # fmt: skip
    assert "own forward" in report.left["halved"]
    assert report.left["encoder.linear1"] == "TransformerEncoderLayer reads the weight itself"
    with torch.no_grad():
        assert torch.equal(model["attention"](x, x, x)[0], before["attention"](x, x, x)[0])
        assert torch.equal(model["encoder"](x), before["encoder"](x))
        assert torch.equal(model["halved"](x), before["halved"](x))


def lora(**settings):
    """(the model that peft wraps, its wrapper) with a LoRA on q and with plain k."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential()
    model.q, model.k = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
    config = peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False, **settings)
    return model, peft.get_peft_model(model, config)


def test_a_lora_keeps_its_effect_over_an_int8_base():
    model, wrapped = lora()
    tuner, x = model.q, torch.randn(3, 64)
    a, b = tuner.lora_A["default"].weight, tuner.lora_B["default"].weight
    report = quantize_(wrapped, EVERY)
    assert list(report.replaced) == ["base_model.model.q.base_layer", "base_model.model.k"]
    assert report.left == {f"base_model.model.q.lora_{part}.default": "a matrix of an adapter of peft" for part in "AB"}
    expected = tuner.base_layer(x) + (x @ a.t() @ b.t()) * tuner.scaling["default"]
    assert torch.allclose(tuner(x), expected, atol=1e-5)
    assert (tuner(x) - tuner.base_layer(x)).norm() > 0.01 * expected.norm()


def test_a_lora_that_needs_float_weights_keeps_them():
    for settings, merged, word in (({"use_dora": True}, False, "DoRA"), ({}, True, "merged")):
        model, wrapped = lora(**settings)
        if merged:
            model.q.merge()
        x = torch.randn(3, 64)
        before = model.q(x)
        report = quantize_(wrapped, EVERY)
        assert list(report.replaced) == ["base_model.model.k"]
        assert word in report.left["base_model.model.q.base_layer"]
        assert torch.equal(model.q(x), before)


def test_other_adapters_and_trained_copies_of_peft_stay():
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.q, model.k, model.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
    wrapped = peft.get_peft_model(model, peft.LoHaConfig(r=4, target_modules=["q"], modules_to_save=["head"]))
    report = quantize_(wrapped, EVERY)
    assert list(report.replaced) == ["base_model.model.k"]
    assert "loha.Linear" in report.left["base_model.model.q.base_layer"]
    assert report.left["base_model.model.head.original_module"] == "peft keeps a trained copy of it"


def test_the_matrices_of_another_library_stay():
    model = nn.ModuleDict({"q": nn.Linear(64, 64), "lora_down": nn.Linear(64, 4), "lora_up": nn.Linear(4, 64)})
    assert list(quantize_(model, EVERY).replaced) == ["q"]


def test_from_linear_refuses_a_wrapper_of_peft():
    model, _ = lora()
    with pytest.raises(InputError, match=r"peft holds adapters.*merge_and_unload"):
        Int8Linear.from_linear(model.q)


def test_int8_weights_wait_on_the_cpu_if_a_gpu_is_full(monkeypatch):
    """A machine without a GPU stands for one: the float weights go before the int8 weights come back."""
    monkeypatch.setattr("int8kit.quantization._waiting_place", lambda found: "cpu")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    moved = []
    monkeypatch.setattr(Int8Linear, "to", lambda layer, place: moved.append(place) or layer)
    everything(model)
    assert moved == ["cpu", "cpu", torch.device("cpu"), torch.device("cpu")]
    assert linears(model) == []


@pytest.mark.parametrize("policy", [3, [3], [], {"a": 1}.values()])
def test_a_policy_of_another_type_is_one_line(policy):
    with pytest.raises(InputError, match="expected a Policy, a function of name and linear, or patterns"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(256, 256)), policy)
