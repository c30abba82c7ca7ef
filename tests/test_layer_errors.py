"""runtime/layer_errors.py and the verb `compare`: the error of INT8 in a model, layer by layer."""

import json
import math

import pytest
import torch

from int8kit import models
from int8kit.cli import main
from int8kit.errors import FileError
from int8kit.models import Case
from int8kit.runtime import ideogram4, layer_errors

CASE = Case(64, 64, text_tokens=9)


def test_error_of_known_tensors():
    y = torch.tensor([3.0, -4.0])
    assert layer_errors.error(y, y) == layer_errors.Distance(math.inf, 1.0, 0.0)
    one = layer_errors.error(y, y + torch.tensor([0.0, 0.05]))
    assert one.sqnr_db == pytest.approx(40.0, abs=1e-3)  # 25 / 0.0025
    assert one.max_error == pytest.approx(0.05 / 4)
    assert layer_errors.error(y, -y).cosine == -1.0
    assert layer_errors.error(y * 0, y * 0) == layer_errors.Distance(math.inf, 1.0, 0.0)


def test_every_linear_of_both_branches_the_largest_error_first():
    totals = []
    branches = layer_errors.compare("tiny", CASE, on_layer=totals.append)
    assert [b.name for b in branches] == ["cond", "uncond"]
    assert totals == [30] * 30
    for b in branches:
        decibels = [one.error.sqnr_db for one in b.layers]
        assert len(decibels) == 15
        assert decibels == sorted(decibels)
        assert 25 < decibels[0] < b.output.sqnr_db < 60  # 8 bits of normal data give some 40
        assert all(0 <= one.saturated < 0.05 for one in b.layers)  # zeros: there is no text in the uncond branch
        assert {one.rows for one in b.layers} <= {16, 25, 9}
    assert branches == layer_errors.compare("tiny", CASE)  # and again


def test_layer_with_the_largest_error_comes_first(monkeypatch):
    load = ideogram4.load

    def with_outliers(model):
        pipe = load(model)
        layer = pipe.transformer.get_submodule("layers.1.attention.to_v")
        with torch.no_grad():
            rows = torch.arange(layer.out_features)
            layer.weight[rows, rows * 7 % layer.in_features] = 60 * layer.weight.std()  # an outlier in each row
        return pipe

    monkeypatch.setattr(ideogram4, "load", with_outliers)
    cond, uncond = layer_errors.compare("tiny", CASE)
    assert cond.layers[0].name == "layers.1.attention.to_v"
    assert cond.layers[0].error.sqnr_db < uncond.layers[0].error.sqnr_db - 3


def test_given_inputs(tmp_path):
    pipe = ideogram4.load("tiny")
    torch.manual_seed(5)
    arguments = models.MODELS["ideogram4"].inputs(pipe.transformer, CASE)
    path = tmp_path / "i.pt"
    torch.save({"cond": arguments}, path)
    given = layer_errors.compare("tiny", CASE, inputs=path)
    random = layer_errors.compare("tiny", CASE)
    assert given[0].output != random[0].output
    assert given[1] == random[1]
    path.write_text("no")
    with pytest.raises(FileError, match="cannot read inputs"):
        layer_errors.compare("tiny", CASE, inputs=path)
    torch.save({"other": {}}, path)
    with pytest.raises(FileError, match="holds no inputs of cond and uncond"):
        layer_errors.compare("tiny", CASE, inputs=path)
    torch.save({"cond": 5}, path)
    with pytest.raises(FileError, match="holds no inputs of cond and uncond"):
        layer_errors.compare("tiny", CASE, inputs=path)
    for wrong in ({"x": 1}, {**arguments, "hidden_states": torch.zeros(1, 2)}):
        torch.save({"cond": wrong}, path)
        with pytest.raises(FileError, match=r"the forward refuses the inputs of .*keyword arguments of the two") as end:
            layer_errors.compare("tiny", CASE, inputs=path)
        assert "\n" not in str(end.value)


def test_compare(capfd, tmp_path):
    with pytest.raises(SystemExit) as end:
        main.main(["compare", "tiny", "--markdown", "-o", str(tmp_path / "c.json")])
    assert end.value.code == 0
    assert json.loads((tmp_path / "c.json").read_text())["branches"]
    out, _ = capfd.readouterr()
    assert " ".join(out.split()).count("layers with the largest errors") == 2
    assert "|" in out
    with pytest.raises(SystemExit) as end:
        main.main(["compare", "tiny", "--inputs", "x.pt"])
    assert end.value.code == 2
    assert "--inputs 'x.pt': no such file" in capfd.readouterr().err
