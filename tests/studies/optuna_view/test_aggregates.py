"""What parameters say of a configuration."""

import pytest

from apportion.studies.database import NewTrial
from apportion.studies.optuna_view.aggregates import Aggregates, distributions, origin_family
from apportion.studies.specification import StudySpec


def spec(options: list[str]) -> StudySpec:
    return StudySpec(
        model={"source": "hf:org/model"},
        data={"source": "text:/corpus"},
        space=[{"sites": "*", "options": options}],
        limits={"bits": 4},
    )


def trial(configuration: dict[str, str], origin: str = "ilp") -> NewTrial:
    return NewTrial(
        configuration=configuration,
        first_window=0,
        windows=1,
        part="search",
        origin=origin,
        costs={"bits": 5.25},
        evaluation_key="",
    )


@pytest.mark.parametrize(
    ("option", "bits"),
    [
        ("dense", 16),
        ("f32", 32),
        ("bf16", 16),
        ("w8", 8),
        ("w8a8", 8),
        ("w4g64", 4.5),
        ("w4g64s", 4.25),
        ("w3", 3),
        ("s50%", 9),
        ("s75%+w4g64", 1 + 4.5 / 4),
        ("2:4", 9),
        ("r25%", 4),
        ("w4g64+r16", 4.5),
        ("c50%+w8", 4),
    ],
)
def test_bits_are_those_of_the_option_grammar(option: str, bits: float) -> None:
    values = Aggregates(dense_bits=16, families=()).values(trial(dict.fromkeys("abc", option)))
    assert values["bits_early"] == values["bits_middle"] == values["bits_late"] == bits


def test_a_third_of_the_weight_sites_has_bits_of_its_own_in_the_order_of_the_model() -> None:
    sites = {"block": "keep", "z": "w4", "y": "w8", "x": "w2", "w": "w2", "v": "dense", "u": "w8"}
    values = Aggregates.of(spec(["dense", "w2"])).values(trial(sites))
    assert [values[f"bits_{third}"] for third in ("early", "middle", "late")] == [6, 2, 20]
    assert values["bits"] == 5.25


@pytest.mark.parametrize("drop", ["drop", "drop:mean"])
def test_what_lies_in_a_dropped_site_is_dropped_and_costs_nothing(drop: str) -> None:
    sites = {"b.1": drop, "b.1.x": "dense", "b.1.y": "dense", "b.10.x": "w8", "b.10.y": "dense"}
    values = Aggregates.of(spec(["dense", "w8", "drop"])).values(trial(sites))
    assert values["share_dropped"] == 0.5
    assert values["share_dense"] == values["share_quantized"] == 0.25
    assert values["bits_early"] == 0


def test_an_option_of_two_steps_counts_for_two_families() -> None:
    space = ["dense", "s50%+w4g64", "w4g64+r16"]
    values = Aggregates.of(spec(space)).values(trial({"a": "s50%+w4g64", "b": "w4g64+r16"}))
    shares = {name: value for name, value in values.items() if name.startswith("share")}
    assert shares == {
        "share_dense": 0,
        "share_quantized": 1,
        "share_sparse": 0.5,
        "share_low_rank": 0.5,
    }


def test_a_family_that_the_space_does_not_offer_is_no_parameter() -> None:
    values = Aggregates.of(spec(["dense", "w8"])).values(trial({"a": "w8"}))
    assert [name for name in values if name.startswith("share")] == [
        "share_dense",
        "share_quantized",
    ]


def test_there_are_twelve_parameters_at_most_however_many_sites() -> None:
    space = ["dense", "w8", "s50%", "r50%", "w4+r8", "keep", "drop", "f32"]
    values = Aggregates.of(spec(space)).values(trial({f"s{n}": "w8" for n in range(500)}))
    assert len(values) <= 12
    assert distributions(values).keys() == values.keys()


@pytest.mark.parametrize(
    ("origin", "family"),
    [("ilp:near", "ilp"), ("uniform:w4g64-drop2", "uniform"), ("score", "score"), ("new", "other")],
)
def test_the_origin_is_the_part_of_the_solver(origin: str, family: str) -> None:
    assert origin_family(origin) == family
