"""A super-net for scikit-learn's handwritten digits: 8 choice blocks, 390,625 sub-networks."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from apportion import Choice

WEIGHTS = Path(__file__).with_name("weights.safetensors")
WIDTHS = (8, 16)
BLOCKS = 4
# The super-net is trained on the calibration part, the study sees the next two; nobody sees the
# test part before benchmarks/supernet.py judges by it.
PARTS = {
    "calibration": (1197, 1797),
    "search": (697, 1197),
    "heldout": (500, 697),
    "test": (0, 500),
}
NOISE = 0.3
BATCH = 100


class Residual(nn.Module):
    """Layers beside a shortcut, behind a norm that keeps no statistics of past batches."""

    def __init__(self, width: int, *layers: nn.Module) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, width, height, width] -> the same shape."""
        return x + self.layers(torch.relu(self.norm(x)))


def conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def alternatives(width: int) -> Choice:
    """What can stand in a place: the first, of most parameters, is what the dense model runs."""
    twice = 2 * width
    return Choice(
        {
            "conv5": Residual(width, conv(width, width, 5)),
            "conv3": Residual(width, conv(width, width, 3)),
            "point": Residual(width, conv(width, twice, 1), nn.ReLU(), conv(twice, width, 1)),
            "conv1": Residual(width, conv(width, width, 1)),
            "skip": nn.Identity(),
        }
    )


class Net(nn.Module):
    """Choice blocks at 8x8 and at 4x4 points, mean of each quarter of the image, a linear layer.

    Nothing but the choice blocks looks at neighboring points.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        inputs = 1
        for width in WIDTHS:
            shrink = nn.Identity() if inputs == 1 else nn.AvgPool2d(2)
            blocks = (alternatives(width) for _ in range(BLOCKS))
            self.stages.append(nn.Sequential(shrink, conv(inputs, width, 1), *blocks))
            inputs = width
        self.norm = nn.GroupNorm(4, inputs)
        self.head = nn.Linear(4 * inputs, 10)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images [n, 1, 8, 8] -> logits [n, 10]; the labels are there for the study's loss."""
        x = images
        for stage in self.stages:
            x = stage(x)
        return self.head(avg_pool2d(torch.relu(self.norm(x)), 2).flatten(1))


def build() -> nn.Module:
    """The trained super-net; train.py made its weights."""
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is not there: run train.py first")
    net = Net()
    net.load_state_dict(load_file(WEIGHTS))
    return net


def digits(part: str, noise: float = NOISE) -> tuple[Tensor, Tensor]:
    """Noisy images [n, 1, 8, 8] and their digits [n], in a shuffled order, always the same."""
    images, labels = load_digits(return_X_y=True)
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=draw)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    pixels += noise * torch.randn(pixels.shape, generator=draw)
    chosen = order[slice(*PARTS[part])]
    return pixels[chosen], torch.from_numpy(labels)[chosen]


def data(part: str) -> list[dict[str, Tensor]]:
    """What a study asks for: batches of images with their labels, each image a window."""
    images, labels = (tensor.split(BATCH) for tensor in digits(part))
    return [{"images": i, "labels": n} for i, n in zip(images, labels, strict=True)]


def loss(output: Tensor, batch: dict[str, Tensor], reference: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the true digits in nats, [n], and weights of one."""
    found = cross_entropy(output, batch["labels"], reduction="none")
    return found, torch.ones_like(found)
