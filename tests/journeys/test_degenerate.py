"""What a user sees of a degenerate model or of such data: one line that names it, or a warning."""

import json
from typing import Any

import pytest

Journey = Any

DOWN = "self.down = nn.Linear(2 * WIDTH, WIDTH)"
RELU = "torch.relu(self.up(x))"
FIRST = "m = Tiny(); mlp = m.blocks[0].mlp; {}; return m"
CALIBRATION = "torch.randn(4, 8, 64, generator=generator) for"


def broken(statement: str) -> tuple[str, str]:
    """The model with something done to the first block's mlp."""
    return "return Tiny()", FIRST.format(statement)


REFUSED = {
    "NaN weight": ("model.py", *broken("mlp.up.weight.data[3, 5] = float('nan')"),
                   "model.source", "1 of 8192 values of blocks.0.mlp.up.weight",
                   "site blocks.0.mlp.up", "not finite"),
    "NaN weight that no output shows": (
        "model.py", f"return self.down({RELU})",
        f"self.up.weight.data[7] = float('nan'); return self.down(torch.nan_to_num({RELU}))",
        "64 of 8192 values of blocks.0.mlp.up.weight"),
    "infinite weights": ("model.py", *broken("mlp.down.weight.data[0] = float('-inf')"),
                         "model.source", "128 of 8192 values of blocks.0.mlp.down.weight"),
    "no window": ("data.py", CALIBRATION,
                  CALIBRATION.replace("4,", "4 * (part != 'calibration'),", 1),
                  "data.source", "without any window for calibration"),
    "no batch": ("data.py", "in range(3)]", "in range(3 * (part != 'calibration'))]",
                 "data.source", "no batch for calibration"),
    "no sample": ("study.toml", "[data]", "[data]\nsamples = { calibration = 0 }",
                  "data.samples.calibration", "at least 1"),
    "group": ("study.toml", '"w4g32"', '"w4g48"', "space[1].options", "group 48 does not divide 64",
              "nearest: w4g32, w4g64"),
    "pattern": ("study.toml", '"w4g32"', '"2:5"', "space[1].options", "a multiple of 5 inputs"),
    "residual above full rank": ("study.toml", '"w4g32"', '"w4+r64"', "space[1].options",
                                 "at most: w4+r63"),
    "rank of nothing": ("study.toml", '"r50%"', '"r1%"', "space[1].options", "nearest: r25%"),
    "outlier of nothing": ("study.toml", '"w4g32"', '"w4+o0.001%"', "space[1].options",
                           "is no weight; nearest: w4+o0.1%"),
}  # fmt: skip
TREATED = {
    "dead channel": ("model.py", *broken("mlp.up.weight.data[5] = 0; mlp.up.bias.data[5] = 0"),
                     "weight sites are degenerate, blocks.0.mlp.up for one: the weights of "
                     "1 of 128 output channels are all 0"),
    "dead inputs": ("model.py", RELU, "torch.relu(self.up(x) - 1000)",
                    "2 weight sites are degenerate, blocks.0.mlp.down for one: all of its 128 "
                    "inputs were 0 throughout calibration"),
    "constant inputs": ("model.py", RELU, "torch.relu(self.up(x) - 1000) + 3",
                        "blocks.0.mlp.down for one: its inputs were the same throughout"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_can_be_made_of_is_one_line_and_no_study(journey: Journey, name: str) -> None:
    file, old, new, *words = REFUSED[name]
    journey.edit(file, old, new)
    ended = journey.submit()
    assert (ended.status, len(ended.error.splitlines())) == (2, 1), ended.error
    assert all(word in ended.error for word in words), ended.error
    assert journey.listed() == []


@pytest.mark.parametrize("name", TREATED)
def test_what_is_treated_is_said(journey: Journey, name: str) -> None:
    file, old, new, words = TREATED[name]
    journey.edit(file, old, new)
    journey.edit("study.toml", "tokens = 200", "tokens = 60")
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    told = " ".join(ended.out.split())
    assert words in told and told.count("are degenerate") == 1, told
    assert "docs/compressors.md" in told
    assert journey.run("export", "tiny", "--to", journey.folder / "winner").status == 0
    assert journey.run("verify", journey.folder / "winner").status == 0


def test_layer_that_calibration_does_not_reach_is_compressed_and_said(journey: Journey) -> None:
    """As an expert is that no token is sent to, whatever methods are asked for."""
    old, hidden = f"return self.down({RELU})", f"hidden = {RELU}"
    journey.edit("model.py", old, f"{hidden}; return self.down(hidden) if x.shape[1] == 8 else x")
    journey.edit("data.py", CALIBRATION, CALIBRATION.replace("8", "8 + (part == 'calibration')", 1))
    journey.edit("study.toml", '"w4g32"', '"w4g32:gptq"')
    ended = journey.submit()
    assert (ended.status, ended.error) == (0, "")
    told = " ".join(ended.out.split())
    assert "blocks.0.mlp.down for one: no calibration data entered it" in told
    (note,) = json.loads(journey.run("show", "tiny", "--json").out)["notes"][:1]
    assert note.startswith("no calibration data entered 2 weights, blocks.0.mlp.down for one: ")
