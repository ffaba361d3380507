"""What a report says of options that gained nothing, and of what calibration never saw."""

from apportion.kernels.formats import LayerShape
from apportion.spaces.grammar import parse_option
from apportion.spaces.sites import Member, Site
from apportion.spaces.space import Space
from apportion.studies.notes import notes_of


def space_of(structure: tuple[str, ...], weights: tuple[str, ...]) -> Space:
    """A sub-block of two layers."""
    layers = [Site(f"mlp.{n}", "linear", (Member(f"mlp.{n}", LayerShape(4, 4)),), "mlp")
              for n in ("up", "down")]  # fmt: skip
    rows = (structure, weights, weights)
    return Space((Site("mlp", "mlp"), *layers), tuple(tuple(map(parse_option, r)) for r in rows))


def test_options_without_credit_are_counted_over_the_sites_that_could_have_them() -> None:
    space = space_of(("keep", "drop", "c50%"), ("dense", "w4", "w3"))
    uncredited = {"mlp": ["c50%"], "mlp.up": ["w4", "w3", "r50%"], "mlp.down": ["w3", "r50%"]}
    profiled = {
        "struck": {"mlp.up": ["r50%", "s20%"], "mlp.down": ["r50%"]},
        "profiles": {"here": {"uncredited": uncredited}, "there": {"uncredited": {}}},
    }
    assert notes_of(space, profiled, {}) == [
        "no latency credit on 'here', runs dense: c50%, w4 (1 of 2 sites), w3, r50%",
        "struck, neither smaller nor faster than dense: r50%, s20%",
    ]


def test_weights_that_no_calibration_data_entered_are_told_of() -> None:
    profiled = {"struck": {}, "profiles": {}}
    one, two = ({"unreached": ["mlp.up", "mlp.down"][:count]} for count in (1, 2))
    space = space_of(("keep",), ("dense",))
    assert notes_of(space, profiled, {}) == []
    assert notes_of(space, profiled, one)[0].startswith("no calibration data entered 1 weight, mlp")
    assert "2 weights, mlp.up for one" in notes_of(space, profiled, two)[0]
