"""timing/wall_clock.py without a GPU: the order of the calls, the warm-up, and the quantiles."""

from collections import Counter

import pytest
import torch

from int8kit import gpus
from int8kit.errors import CheckFailed, InputError
from int8kit.timing import wall_clock
from int8kit.timing.wall_clock import Quantiles, interleaved

NAMES = ("a", "b", "c")


@pytest.fixture
def clock(monkeypatch):
    """The host's clock, which only the calls advance: [seconds]."""
    now = [100.0]
    monkeypatch.setattr(wall_clock.time, "perf_counter", lambda: now[0])
    return now


def test_every_round_calls_every_contestant_once_in_a_shuffled_order():
    def run():
        calls = []
        interleaved({name: lambda name=name: calls.append(name) for name in NAMES}, 12, warm_up=3, gate=False)
        return [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]

    rounds = run()
    assert len(rounds) == 15
    assert all(set(one) == set(NAMES) for one in rounds)
    assert len(set(rounds)) > 3  # the order changes
    assert rounds == run()  # and can be reproduced


def test_a_warm_up_is_not_timed(clock):
    calls, heard = Counter(), []

    def call(name, ms):
        calls[name] += 1
        clock[0] += 1e-3 * (1000 if calls[name] <= 2 else ms * (calls[name] - 2))

    contestants = {"short": lambda: call("short", 1), "long": lambda: call("long", 10)}
    found = interleaved(contestants, 5, 2, lambda number, ms: heard.append((number, dict(ms))), gate=False)
    assert calls == {"short": 7, "long": 7}
    assert list(found) == ["short", "long"]
    assert vars(found["short"]) == pytest.approx(vars(Quantiles(1.8, 3, 4.2, 5)))
    assert vars(found["long"]) == pytest.approx(vars(Quantiles(18, 30, 42, 5)))
    assert [number for number, _ in heard] == [1, 2, 3, 4, 5]
    assert [ms["long"] for _, ms in heard] == pytest.approx([10, 20, 30, 40, 50])


def test_one_round_gives_three_equal_quantiles(clock):
    def call():
        clock[0] += 0.5

    assert interleaved({"a": call}, 1, 0, gate=False) == {"a": Quantiles(500, 500, 500, 1)}


def test_a_call_is_timed_until_the_gpu_is_idle(monkeypatch, clock):
    events = []

    def synchronize():
        events.append("synchronize")
        clock[0] += 0.25  # the GPU still works

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert wall_clock.synchronized_ms(lambda: events.append("call")) == 250  # the first wait is not the call's
    assert events == ["synchronize", "call", "synchronize"]


def test_the_gate_closes_before_the_first_call(monkeypatch):
    def unhealthy(gpu):
        raise CheckFailed(f"{gpu.name} is slowed")

    calls = []
    monkeypatch.setattr(wall_clock, "present", lambda: gpus.get("h200"))
    monkeypatch.setattr(wall_clock, "check_health", unhealthy)
    with pytest.raises(CheckFailed, match="NVIDIA H200 is slowed"):
        interleaved({"a": lambda: calls.append("a")}, 1)
    assert calls == []
    interleaved({"a": lambda: calls.append("a")}, 1, 0, gate=False)
    assert calls == ["a"]


@pytest.mark.parametrize(
    ("names", "rounds", "warm_up", "message"),
    [
        ((), 1, 0, "no contestants: expected 1 or more"),
        (NAMES, 0, 0, "0 rounds: expected 1 or more"),
        (NAMES, 1, -1, "-1 rounds to warm up: expected 0 or more"),
    ],
)
def test_bad_numbers(names, rounds, warm_up, message):
    calls = []
    with pytest.raises(InputError, match=message):
        interleaved({name: lambda: calls.append(1) for name in names}, rounds, warm_up, gate=False)
    assert calls == []
