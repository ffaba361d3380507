"""Foreign databases of `.pth` files: their weights are read, their code never runs."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.studies.evopress.database import (
    open_database,
    read_sparsity_levels,
    write_database,
)
from apportion.studies.evopress.scales import SparsityLevels

MODULE = "model.layers.0.self_attn.q_proj"


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def _saved(folder: Path, value: object, name: str = f"{MODULE}/3.pth", **how: bool) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, **how)
    return path


def _read(folder: Path) -> Tensor:
    return open_database(folder).tensor(MODULE, "3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_written_database_is_read_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tmp_path / "Model" / "3bit"
    weights = {(m, lv): torch.randn(4, 6).to(dtype) for m in ("a.q", "a.k") for lv in ("2", "10")}
    write_database(folder, ((m, lv, w) for (m, lv), w in weights.items()))
    database = open_database(folder)
    assert database.levels == {"a.q": ("2", "10"), "a.k": ("2", "10")}
    for (module, level), weight in weights.items():
        found = database.tensor(module, level)
        assert found.dtype == dtype and torch.equal(found, weight)
    # what EvoPress itself does with a file
    assert torch.equal(torch.load(folder / "a.q" / "2.pth"), weights["a.q", "2"])


def test_sparsity_database_goes_through_with_its_metadata(tmp_path: Path) -> None:
    folder, scale = tmp_path / "sparse", SparsityLevels(0.5, 8, 2)
    weight = torch.randn(4, 8)
    write_database(folder, [("m", str(level), weight) for level in (1, -2, 0)], scale)
    assert open_database(folder).levels == {"m": ("-2", "0", "1")}
    assert read_sparsity_levels(folder) == scale


def test_gguf_database_is_read_where_it_holds_dense_weights(tmp_path: Path) -> None:
    weight = torch.randn(4, 6, dtype=torch.float16)
    for level in ("4.5-Q4_K", "2.5625-Q2_K", "16-F16"):
        path = _saved(tmp_path, weight, f"layers-hf/{MODULE}/{level}.pth")
        path.with_name(f"{level}-metadata.json").write_text("{}")
        codes = tmp_path / "layers-gguf" / "blk.0.attn_q.weight" / f"{level}.pth"
        codes.parent.mkdir(parents=True, exist_ok=True)
        codes.write_bytes(bytes(84))
    (tmp_path / "layers-hf" / "manifest.json").write_text("{}")
    dense, packed = open_database(tmp_path / "layers-hf"), open_database(tmp_path / "layers-gguf")
    assert dense.levels == {MODULE: ("2.5625-Q2_K", "4.5-Q4_K", "16-F16")}
    assert torch.equal(dense.tensor(MODULE, "4.5-Q4_K"), weight)
    assert packed.levels == {"blk.0.attn_q.weight": ("2.5625-Q2_K", "4.5-Q4_K", "16-F16")}
    with pytest.raises(InvalidInput, match="holds GGUF's codes; dense weights are in .*layers-hf"):
        packed.tensor("blk.0.attn_q.weight", "4.5-Q4_K")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "ran"
    hostile = [torch.zeros(2, 2), Hostile(mark)]
    path = _saved(tmp_path / "db", hostile, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InvalidInput) as refusal:
        _read(tmp_path / "db")
    assert str(path) in str(refusal.value) and "weights_only" not in str(refusal.value)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file would have run its code under a reader that lets it"


def test_hostile_bare_pickle_and_metadata_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "db" / MODULE / "3.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(InvalidInput):
        _read(tmp_path / "db")
    _saved(tmp_path / "db", {"sparsity": 0.5, "more": Hostile(mark)}, "metadata.pth")
    with pytest.raises(InvalidInput):
        read_sparsity_levels(tmp_path / "db")
    assert not mark.exists()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_is_a_matrix_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = _saved(tmp_path, torch.ones(3, 5))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), place]))])
    try:
        assert _read(tmp_path).ndim == 2
    except InvalidInput as refusal:
        assert str(path) in str(refusal)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"weight": torch.zeros(2, 2)}, "holds dict, not one dense tensor"),
        (torch.zeros(4), "of 1 dimensions"),
        (torch.zeros(2, 2, dtype=torch.int8), "torch.int8 of 2 dimensions"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(2, 2, device="meta"), "dense floating-point"),
        (torch.zeros(1).expand(10**6, 10**6), "repeats the same weights"),
    ],
    ids=["dict", "vector", "integer", "sparse", "meta", "expanded"],
)
def test_tensor_that_is_no_dense_matrix_refused(tmp_path: Path, value: object, words: str) -> None:
    _saved(tmp_path, value)
    with pytest.raises(InvalidInput, match=words):
        _read(tmp_path)


def test_parameter_is_read_as_its_weights(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    _saved(tmp_path, nn.Parameter(weight))
    found = _read(tmp_path)
    assert torch.equal(found, weight) and not found.requires_grad


def test_unknown_module_and_level_refused(tmp_path: Path) -> None:
    _saved(tmp_path, torch.zeros(2, 2))
    database = open_database(tmp_path)
    with pytest.raises(InvalidInput, match="has no level 4 of .*q_proj; levels: 3"):
        database.tensor(MODULE, "4")
    with pytest.raises(InvalidInput, match="the module is not there"):
        database.tensor("../other", "3")


def test_folder_that_is_no_database_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="none is no folder"):
        open_database(tmp_path / "none")
    _saved(tmp_path / "Model", torch.zeros(2, 2), f"3bit/{MODULE}/3.pth")
    with pytest.raises(InvalidInput, match="holds no MODULE/LEVEL.pth; a quantization database"):
        open_database(tmp_path / "Model")
    _saved(tmp_path, torch.zeros(2, 2), f"{MODULE}/best.pth")
    with pytest.raises(InvalidInput, match="best.pth is no level"):
        open_database(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"sparsity": 0.5, "weights_diff": 8}, "metadata.pth holds no int num_levels"),
        ({"sparsity": "0.5", "weights_diff": 8, "num_levels": 2}, "holds no float sparsity"),
        ([0.5, 8, 2], "holds no float sparsity"),
        ({"sparsity": 2.0, "weights_diff": 8, "num_levels": 2}, "metadata.pth: sparsity 2.0"),
    ],
)
def test_metadata_wrong_refused(tmp_path: Path, metadata: object, words: str) -> None:
    _saved(tmp_path, metadata, "metadata.pth")
    with pytest.raises(InvalidInput, match=words):
        read_sparsity_levels(tmp_path)


def test_missing_metadata_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="metadata.pth cannot be read: No such file"):
        read_sparsity_levels(tmp_path)


def test_view_is_written_without_what_it_was_cut_from(tmp_path: Path) -> None:
    whole = torch.randn(1000, 8)
    write_database(tmp_path / "db", [(MODULE, "3", whole[:2])])
    path = tmp_path / "db" / MODULE / "3.pth"
    with zipfile.ZipFile(path) as file:
        (data,) = (entry for entry in file.infolist() if entry.filename.endswith("/data/0"))
    assert data.file_size == 2 * 8 * 4
    assert torch.equal(_read(tmp_path / "db"), whole[:2])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([("../a", "3", torch.zeros(2, 2))], "are no module and level"),
        ([("a", "3/4", torch.zeros(2, 2))], "are no module and level"),
        ([("a", "3", torch.zeros(2))], "of 1 dimensions"),
        ([("a", "3", torch.zeros(2, 2)), ("a", "3", torch.ones(2, 2))], "a has level 3 twice"),
    ],
    ids=["module", "level", "vector", "twice"],
)
def test_write_database_wrong_weights_refused(
    tmp_path: Path, weights: list[tuple[str, str, Tensor]], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        write_database(tmp_path / "db", weights)


def test_write_database_existing_folder_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="exists already; choose another folder"):
        write_database(tmp_path, [])
