"""Models and data from references: what is found, what is refused, and how parts are cut."""

from pathlib import Path

import pytest
import torch
from torch import nn

from apportion.errors import InvalidInput
from apportion.workers.samples import PARTS, check_disjoint
from apportion.workers.sources import open_data, open_model
from apportion.workers.spec import WorkerSpec
from apportion.workers.user_code import load_function, reference_of

MODEL = """
import torch
from torch import nn
from parts import width
def build():
    return nn.Sequential(nn.Linear(width, 3))
def wrong():
    return "a model"
def raises():
    raise ValueError("no weights here")
def data(part):
    return [(torch.full((4, 2), float(k)), torch.arange(4)) for k in range(3)]
not_callable = 3
"""


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    (tmp_path / "parts.py").write_text("width = 2\n")
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def tokenizer_of(spec: WorkerSpec) -> object:
    return open_model(spec["source"], "float32", Path("/")).tokenizer


def test_folder_without_prefix_is_a_hugging_face_model(home: Path) -> None:
    plain, named = (open_model(s, "float32", home) for s in ("model", "hf:model"))
    assert plain.source == named.source == f"hf:{home / 'model'}"
    assert plain.revision == named.revision
    assert not plain.model.training
    assert not any(p.requires_grad for p in plain.model.parameters())


def test_dtype_is_applied(home: Path) -> None:
    assert next(open_model("model", "bfloat16", home).model.parameters()).dtype == torch.bfloat16


def test_python_model_imports_its_neighbors(user_folder: Path) -> None:
    opened = open_model("python:model.py:build", "float32", user_folder)
    assert isinstance(opened.model, nn.Sequential)
    assert opened.source == f"python:{user_folder / 'model.py'}:build"


def test_python_model_has_the_same_random_weights_each_time(user_folder: Path) -> None:
    revisions = {
        open_model("python:model.py:build", "float32", user_folder).revision for _ in range(2)
    }
    assert len(revisions) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("python:model.py:biuld", 'did you mean "build"'),
        ("python:nothing.py:build", "no file"),
        ("python:model.py", "the two lines that work"),
        ("python:model.py:not_callable", "is no function"),
        ("python:model.py:wrong", "returned str, not an nn.Module"),
        ("python:model.py:raises", "raised ValueError: no weights here at model.py, line 10"),
        ("python:no_such_package.module:build", "ModuleNotFoundError"),
        ("onnx:model.onnx", "begins with neither hf: nor python:"),
        ("hf:./missing/folder/here", "no folder"),
        (".", "holds no .safetensors file"),
    ],
)
def test_model_that_cannot_be_opened(user_folder: Path, source: str, message: str) -> None:
    with pytest.raises(InvalidInput, match="^[^\n]*$") as error:
        open_model(source, "float32", user_folder)
    assert message in str(error.value)


def test_unknown_dtype(home: Path) -> None:
    with pytest.raises(InvalidInput, match="float8"):
        open_model("model", "float8", home)


def test_reference_of_a_function_finds_it_again(user_folder: Path) -> None:
    function = load_function("python:model.py:build", user_folder, "model.source").function
    assert reference_of(function, "model.source") == f"python:{user_folder / 'model.py'}:build"


def test_reference_of_a_lambda_is_refused() -> None:
    with pytest.raises(InvalidInput, match="the two lines that work"):
        reference_of(lambda: nn.Linear(1, 1), "model.source")


def test_one_source_gives_disjoint_parts(spec: WorkerSpec) -> None:
    tokenizer = tokenizer_of(spec)
    parts = {part: open_data(spec["data"], part, tokenizer, Path("/")) for part in PARTS}
    assert [parts[part].windows for part in PARTS] == [10, 20, 10]
    check_disjoint(parts)


def test_one_document_is_cut_by_windows(spec: WorkerSpec, tmp_path: Path) -> None:
    text = " ".join(f"value {k} in range" for k in range(300))
    (tmp_path / "long.txt").write_text(text)
    section = spec["data"] | {"source": "text:long.txt"}
    tokenizer = tokenizer_of(spec)
    parts = {part: open_data(section, part, tokenizer, tmp_path) for part in PARTS}
    check_disjoint(parts)
    assert [parts[part].windows for part in PARTS] == [10, 20, 10]


def test_order_depends_on_the_seed_and_not_on_names(spec: WorkerSpec, tmp_path: Path) -> None:
    tokenizer, section = tokenizer_of(spec), spec["data"]
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for file in Path(section["source"].removeprefix("text:")).iterdir():
        (renamed / f"x{file.name}").write_bytes(file.read_bytes())
    again = open_data(section | {"source": f"text:{renamed}"}, "search", tokenizer, tmp_path)
    first = open_data(section, "search", tokenizer, tmp_path)
    assert again.hash == first.hash
    assert open_data(section, "search", tokenizer, tmp_path, seed=1).hash != first.hash


def test_less_text_than_asked_is_noted(spec: WorkerSpec) -> None:
    section = spec["data"] | {"tokens": dict.fromkeys(PARTS, 10**6)}
    samples = open_data(section, "search", tokenizer_of(spec), Path("/"))
    assert samples.note is not None
    assert "of 1,000,000 tokens" in samples.note


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("binary.txt", b"\0\1\2", "is binary"),
        ("latin.txt", "é".encode("latin-1"), "is not UTF-8 text"),
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"def", "leaves no window"),
    ],
)
def test_text_that_cannot_be_used(
    spec: WorkerSpec, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    section = spec["data"] | {"source": f"text:{name}"}
    with pytest.raises(InvalidInput, match=message):
        open_data(section, "search", tokenizer_of(spec), tmp_path)


def test_text_without_tokenizer(spec: WorkerSpec) -> None:
    with pytest.raises(InvalidInput, match="needs a tokenizer"):
        open_data(spec["data"], "search", None, Path("/"))


def test_parts_that_share_documents_are_refused(spec: WorkerSpec) -> None:
    source = spec["data"]["source"]
    section = spec["data"] | {"search": source, "heldout": {"source": source}}
    tokenizer = tokenizer_of(spec)
    parts = {p: open_data(section, p, tokenizer, Path("/")) for p in ("search", "heldout")}
    with pytest.raises(InvalidInput, match="search and heldout share"):
        check_disjoint(parts)


def test_python_data_keep_their_batches(user_folder: Path) -> None:
    section = {"source": "python:model.py:data"}
    samples = open_data(section, "search", None, user_folder)
    assert samples.windows == 12
    assert [chunk.first for chunk in samples.chunks(8)] == [0, 4, 8]
    assert samples.documents is None


def test_python_data_that_are_no_sequence(user_folder: Path) -> None:
    with pytest.raises(InvalidInput, match="its signature is def data"):
        open_data({"source": "python:text_data.py:data"}, "search", None, _with_text(user_folder))


def _with_text(folder: Path) -> Path:
    (folder / "text_data.py").write_text("def data(part):\n    return 3\n")
    return folder
