"""Statistics files: safetensors, whole or not at all, read a site at a time."""

import errno
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from apportion.spaces.compressors.compose import InputStatistics
from apportion.spaces.statistics import StatisticsFiles, read_statistics, write_statistics


def statistics(width, tokens, peak=None):
    return InputStatistics(torch.randn(width, width, dtype=torch.float64), tokens, peak)


@given(st.dictionaries(st.text(max_size=9), st.integers(1, 9), max_size=4), st.integers(0, 1 << 40))
def test_written_statistics_are_read_back(tmp_path_factory, widths, tokens):
    # A name that ends like another's count cannot be a path of a module.
    widths = {name: width for name, width in widths.items() if not name.endswith(":n")}
    path = tmp_path_factory.getbasetemp() / "folder" / "written.safetensors"
    sites = {name: statistics(width, tokens) for name, width in widths.items()}
    write_statistics(path, sites)
    for name, expected in sites.items():
        found = read_statistics(path, name)
        assert torch.equal(found.second_moment, expected.second_moment)
        assert (found.second_moment.dtype, found.tokens) == (torch.float64, tokens)
    assert read_statistics(path, "no such site") is None


def test_file_is_safetensors(tmp_path):
    path = tmp_path / "written.safetensors"
    sites = {"a": statistics(3, 7), "b.c+d": statistics(300, 8)}
    write_statistics(path, sites)
    found = load_file(path)
    assert found.keys() == {"a", "a:n", "b.c+d", "b.c+d:n"}
    assert torch.equal(found["b.c+d"], sites["b.c+d"].second_moment)
    assert (found["a:n"].item(), found["b.c+d:n"].item()) == (7, 8)


def test_peaks_are_read_back_and_change_a_hash_of_their_own_alone(tmp_path):
    one = statistics(3, 7, torch.tensor([1.0, 2.0, 0.0]))
    other = replace(one, peak=torch.tensor([1.0, 2.5, 0.0]))
    sites = {"one": one, "other": other, "none": replace(one, peak=None)}
    write_statistics(tmp_path / "written", sites)
    files = StatisticsFiles(dict.fromkeys((*sites, "no site"), tmp_path / "written"))
    assert torch.equal(files.of("other").peak, other.peak) and files.of("none").peak is None
    assert files.of("other").peak.dtype == torch.float32
    assert len({files.hash(name) for name in sites}) == 1
    assert len({files.peak_hash(name) for name in sites}) == 3
    assert files.peak_hash("none") is None and files.peak_hash("no site") is None


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_statistics(tmp_path / "written.safetensors", {"a": statistics(3, 7)})
    assert list(tmp_path.iterdir()) == []
