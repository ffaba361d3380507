"""Weights that all processes of a machine map from one file."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from apportion.workers.shared_weights import share_weights

MB = 10**6
# Says what it has of its own, with weights of 100 MB; ends when its input does.
WORKER = """
import sys
from pathlib import Path
import psutil, torch
from torch import nn
from apportion.workers.shared_weights import share_weights
torch.manual_seed(0)
model = nn.Linear(5000, 5000, bias=False).requires_grad_(False)
assert share_weights(model, Path(sys.argv[1]))
print("mapped", flush=True)
sys.stdin.readline()
float(model(torch.ones(1, 5000)).sum())
print(psutil.Process().memory_full_info().uss, flush=True)
sys.stdin.readline()
"""


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 3), "norm": nn.LayerNorm(3)})
    model["head"] = nn.Linear(3, 7)
    model["head"].weight = model["embed"].weight  # type: ignore[assignment]
    return model.to(torch.bfloat16).requires_grad_(False)


def test_values_and_ties_stay(tmp_path: Path) -> None:
    model, expected = tied(), tied()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert share_weights(model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])
        assert tensor.data_ptr() != before[name] and tensor.data_ptr() % 64 == 0
    assert model["head"].weight is model["embed"].weight  # type: ignore[index]


def test_writing_to_weights_changes_no_file(tmp_path: Path) -> None:
    model = tied()
    share_weights(model, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for parameter in model.parameters():
        parameter.fill_(1)
    assert file.read_bytes() == content


def test_damaged_file_is_not_used_and_written_again(tmp_path: Path) -> None:
    share_weights(tied(), tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for damaged in (content[:-64], bytes(len(content))):
        file.write_bytes(damaged)
        model, expected = tied(), tied()
        assert not share_weights(model, tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name])
    assert share_weights(tied(), tmp_path)
    assert file.read_bytes() == content


def test_folder_that_takes_no_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert not share_weights(tied(), tmp_path / "cache")


def test_two_processes_have_the_weights_once(tmp_path: Path) -> None:
    """Both write at the same time, and map the same file."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = []
    for _ in range(2):  # all are at the same point, then all go on
        said += [worker.stdout.readline() for worker in workers if worker.stdout]
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
    own = [int(line) for line in said[2:]]
    alone = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path)],
        input="\n\n",
        capture_output=True,
        text=True,
        check=True,
    )
    # Alone, the mapped pages are nobody else's.
    baseline = int(alone.stdout.split()[1]) - 100 * MB
    assert max(own) < baseline + 30 * MB
    assert [worker.wait(30) for worker in workers] == [0, 0]
    assert [file.suffix for file in tmp_path.iterdir()] == [".bin"]
