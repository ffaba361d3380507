"""A small residual network for scikit-learn's handwritten digits, and its data."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import relu

WEIGHTS = Path(__file__).with_name("weights.safetensors")
WIDTH = 32
BLOCKS = 4
# The first images are trained on and calibrate; the search and the judgement see others.
PARTS = {"calibration": (0, 1000), "search": (1000, 1400), "heldout": (1400, 1797)}
BATCH = 50


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, width, height, width] -> the same shape."""
        return relu(x + self.norm2(self.conv2(relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """Stem, residual blocks, mean over the image, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(WIDTH) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 1, 8, 8] in 0..1 -> logits [n, 10]."""
        x = relu(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def build() -> nn.Module:
    """The trained network; train.py made its weights."""
    net = Net()
    net.load_state_dict(load_file(WEIGHTS))
    return net


def digits(part: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] in 0..1 and their digits [n], in a shuffled order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[slice(*PARTS[part])]
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    return pixels[chosen], torch.from_numpy(labels)[chosen]


def data(part: str) -> list[Tensor]:
    """What a study asks for: batches of images, each image a window."""
    return list(digits(part)[0].split(BATCH))
