"""Limits as people write them."""

import pytest

from apportion.errors import InvalidInput
from apportion.studies.limits import Limit, limit_problems, parse_limit


@pytest.mark.parametrize(
    ("kind", "text", "limit"),
    [
        ("weight_bytes", "1.1 GB", Limit("weight_bytes", value=1.1e9)),
        ("resident_bytes", "90MB", Limit("resident_bytes", value=90e6)),
        ("latency.here", "900 ms", Limit("latency.here", value=900.0)),
        ("latency.here", "2 s", Limit("latency.here", value=2000.0)),
        ("latency.here", "0.5x dense", Limit("latency.here", factor=0.5, unit="dense")),
        ("latency.worst", "0.8x bf16", Limit("latency.worst", factor=0.8, unit="bf16")),
        ("weight_bytes", "1 x w4g64", Limit("weight_bytes", factor=1.0, unit="w4g64")),
        ("bits", "3.5", Limit("bits", value=3.5)),
        ("cache_bytes", "20 KB", Limit("cache_bytes", value=20e3)),
        ("cache_bytes", "1x k4v4", Limit("cache_bytes", factor=1.0, unit="k4v4")),
        ("bits", 4, Limit("bits", value=4.0)),
    ],
)
def test_parse_limit_readable(kind: str, text: str, limit: Limit) -> None:
    assert parse_limit(kind, text) == limit


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("weight_bytes", "1.1 GiB", 'limits.weight_bytes: "1.1 GiB" is no quantity'),
        ("weight_bytes", "1.1", "is no quantity"),
        ("weight_bytes", "900 ms", 'example "1.1 GB"'),
        ("latency.here", "1.1 GB", 'example "900 ms"'),
        ("latency.here", "0.5x", 'of what? write for example "0.5x dense"'),
        ("latency.here", "50 %", 'of what? write for example "0.5x dense"'),
        ("latency.worst", "900 ms", "is no share of the dense latency"),
        ("bits", "three", 'write "3.5" or "1x w4g64"'),
        ("weight_bytes", "0 GB", "must be above zero"),
        ("latency.here", "0x dense", "must be above zero"),
        ("latency.here", "1x drop", "a unit is one weight option for all sites"),
        ("latency.here", "1x w4q64", "w4q64"),
        ("cache_bytes", "1x k5v5", "keys and values of a cache have 2, 3, 4, 8 bits"),
        ("weight_bytes", "-1 GB", "is no quantity"),
    ],
)
def test_parse_limit_refused(kind: str, text: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        parse_limit(kind, text)
    assert str(refusal.value).startswith(f"limits.{kind}: ")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({}, "limits: at least one is needed"),
        ({"latency.heer": "1 ms"}, 'limits.latency.heer: no device "heer"; did you mean "here"?'),
        ({"latency.zzz": "1 ms"}, 'limits.latency.zzz: no device "zzz"; devices: here'),
        ({"latency": "1 ms"}, "limits.latency: name the device: latency.here"),
        ({"weight_byte": "1 GB"}, 'did you mean "weight_bytes"?'),
        ({"weight_bytes": 7}, "limits.weight_bytes: write a quantity with its unit in quotes"),
    ],
)
def test_limit_problems_named(limits: dict[str, object], line: str) -> None:
    (problem,) = limit_problems(limits, ["here"])
    assert line in problem


def test_limit_problems_none() -> None:
    assert limit_problems({"latency.worst": "0.5x dense", "bits": 3.5}, ["here"]) == []
