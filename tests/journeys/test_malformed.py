"""What is wrong with a model, data, a loss, limits or a device is one line; no study is left."""

import json
from typing import Any

import pytest

Journey = Any

MODELS = {
    "syntax": ("return Tiny()", "return Tiny(", "importing", "SyntaxError"),
    "raises": ("return Tiny()", "return Tiny(width=3)", "TypeError", "model.py, line"),
    "no function": ("def build()", "def make()", 'no function "build"', "model.source"),
    "a number": ("def build() -> nn.Module:", "build = 3\ndef b():", "is no function", "def build"),
    "no module": ("return Tiny()", "return {}", "returned dict, not an nn.Module", "def build"),
    "exits": ("WIDTH = 64", "WIDTH = 64\nraise SystemExit(0)", "SystemExit", "model.py"),
    "deep": ("scores = self", "scores = self.p", "AttributeError", "model.py, line"),
    "wrong size": ("* WIDTH, WIDTH)", "* WIDTH, WIDTH + 1)", "RuntimeError", "model.py, line"),
    "endless": ("return self.o(", "return self(x) + self.o(", "RecursionError", "model.py, line"),
    "not finite": ("return Tiny()", 'm = Tiny(); m.head.weight.data[0] = float("nan"); return m',
                   "is not finite", "objective.loss"),
    "random": ("10 * x)", "x + torch.rand(()))", "another output the second time", "model.source"),
    "no tensor": ("return self.head(10 * x)", "return None", "returns NoneType", "model.source"),
}  # fmt: skip
DATA = {
    "none": ("return [torch", "return None and [torch", "returned NoneType for", "data.source"),
    "no batch": ("in range(3)]", "in range(0)]", "returned no batch for", "data.source"),
    "arrays": ("generator=generator)", "generator=generator).numpy()", "a batch of ndarray",
               "data.source"),
    "scalars": ("torch.randn(4, 8, 64, generator=generator)", "torch.tensor(1.0)",
                "a batch of Tensor", "data.source"),
    "other width": ("(4, 8, 64", "(4, 8, 63", "RuntimeError", "model.py, line"),
    "other type": ("torch.randn(4, 8, 64, ", "torch.randint(9, (4, 8, 64), ", "RuntimeError",
                   "model.py, line"),
    "raises": ("PARTS.index(part)", "PARTS.index(part + part)", "ValueError", "data.py, line"),
    "shared": ("manual_seed(PARTS.index(part))", "manual_seed(0)", "calibration and search share",
               "data:"),
    "not finite": ("for _ in range(3)]", "/ 0 for _ in range(3)]", "is not finite", "search"),
}  # fmt: skip
LOSSES = {
    "shape": ("output.mean(), 1", "Tensor []", "one of each per window"),
    "one value": ("output.mean((1, 2))", "Tensor [4]", "one of each per window"),
    "nan": ("output.mean((1, 2)) / 0 * 0, torch.ones(len(output))", "not finite", "objective"),
    "raises": ("output.nothing", "AttributeError", "loss.py, line 2"),
}
STUDIES = {
    "small": ('"0.4x dense"', '"1 KB"', "limits cannot be met: weight_bytes 1 KB", "smallest"),
    "fast": ('"1x dense"', '"0.00001 ms"', "limits cannot be met: latency.here", "the least"),
    "unit": ('"0.4x dense"', '"1x w3"', "limits.weight_bytes", "w3"),
    "latency unit": ('"1x dense"', '"1x w3"', "limits.latency.here", "w3"),
    "pattern": ('"linear:blocks.*"', '"linear:block.*"', "matches no site", "space[1].sites"),
    "group": ('"w4g32"', '"w4g48"', "group 48 does not divide", "nearest"),
    "no model": ('"python:model.py:build"', '"python:modl.py:build"', "no file", "modl.py"),
    "no data": ('"python:data.py:load"', '"python:dta.py:load"', "no file", "dta.py"),
    "no device": ('"timings.json"', '"timing.json"', "no file", "timing.json"),
    "request": ("batch = 1 }", "batch = 2 }", "measurements are missing", "recorded device"),
    "prefill": ('phase = "forward", batch = 1', 'phase = "prefill", batch = 1, tokens = 8',
                "devices.here", "vocab_size"),
    "no request": ('request = [{ phase = "forward", batch = 1 }]', "", "request", "devices.here"),
}  # fmt: skip


def assert_refused(journey: Journey, *words: str) -> None:
    for command in ("submit", "submit"):
        ended = journey.run(command, journey.study)
        assert ended.status == 2, ended.error
        assert len(ended.error.splitlines()) == 1, ended.error
        assert "Traceback" not in ended.error
        for word in words:
            assert word in ended.error
        assert journey.listed() == []


@pytest.mark.parametrize("name", MODELS)
def test_model_that_is_wrong(journey: Journey, name: str) -> None:
    old, new, *words = MODELS[name]
    journey.edit("model.py", old, new)
    assert_refused(journey, *words)


@pytest.mark.parametrize("name", DATA)
def test_data_that_are_wrong(journey: Journey, name: str) -> None:
    old, new, *words = DATA[name]
    journey.edit("data.py", old, new)
    assert_refused(journey, *words)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_that_is_wrong(journey: Journey, name: str) -> None:
    returned, *words = LOSSES[name]
    text = f"import torch\ndef loss(output, batch, reference): return {returned}\n"
    (journey.folder / "loss.py").write_text(text)
    journey.edit("study.toml", "[objective]", '[objective]\nloss = "python:loss.py:loss"')
    assert_refused(journey, *words)


@pytest.mark.parametrize("name", STUDIES)
def test_study_that_cannot_be(journey: Journey, name: str) -> None:
    old, new, *words = STUDIES[name]
    journey.edit("study.toml", old, new)
    assert_refused(journey, *words)


def test_recorded_device_without_a_measurement(journey: Journey) -> None:
    file = journey.folder / "timings.json"
    recorded = json.loads(file.read_text())
    recorded["measurements"].popitem()
    file.write_text(json.dumps(recorded))
    assert_refused(journey, "devices.here", "1 measurements are missing")


def test_recorded_device_of_other_threads(journey: Journey) -> None:
    journey.edit("study.toml", 'kind = "recorded"', 'kind = "recorded"\nthreads = 7')
    assert_refused(journey, "devices.here", "threads: 7", "recorded with 1")


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 1}', "{"])
def test_recorded_device_that_is_none(journey: Journey, content: str) -> None:
    (journey.folder / "timings.json").write_text(content)
    assert_refused(journey, "recorded device", "timings.json")


def test_home_that_cannot_be(journey: Journey) -> None:
    journey.home.write_text("a file")
    ended = journey.run("submit", journey.study)
    assert (ended.status, len(ended.error.splitlines())) == (2, 1)
    assert f"home {journey.home}" in ended.error


def test_corrected_file_may_take_the_name(journey: Journey) -> None:
    journey.edit("study.toml", '"1x dense"', '"0.00001 ms"')
    assert journey.submit().status == 2
    journey.edit("study.toml", '"0.00001 ms"', '"1x dense"')
    assert journey.submit().status == 0
