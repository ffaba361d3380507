"""A super-net for scikit-learn's handwritten digits in scenes: 12 choice blocks of 6 alternatives.

Plain convolutions, and alternatives of DARTS (Liu et al. 2019): separable convolution, average and
maximum pooling, skip. What is slow on a processor is not what has most parameters.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from apportion import Choice

WEIGHTS = Path(__file__).with_name("weights.safetensors")
WIDTHS = (8, 16)
BLOCKS = 6
# The super-net is trained on the calibration part, the study sees the next two; nobody sees the
# test part before benchmarks/supernet.py judges by it.
PARTS = {
    "calibration": (1197, 1797),
    "search": (697, 1197),
    "heldout": (500, 697),
    "test": (0, 500),
}
SIDE, FRAGMENT = 10, 4
NOISE = 0.2
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


def conv(inputs: int, outputs: int, size: int, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups)


def alternatives(width: int) -> Choice:
    """What can stand in a place: the first is what the dense model runs."""
    return Choice(
        {
            "conv5": Residual(width, conv(width, width, 5)),
            "conv3": Residual(width, conv(width, width, 3)),
            "sep3": Residual(width, conv(width, width, 3, width), conv(width, width, 1)),
            "avg3": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            "max3": nn.MaxPool2d(3, stride=1, padding=1),
            "skip": nn.Identity(),
        }
    )


class Net(nn.Module):
    """Choice blocks at 10x10 and at 5x5 points, mean of each quarter of the scene, a linear layer.

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
        """Scenes [n, 1, 10, 10] -> logits [n, 10]; the labels are there for the study's loss."""
        x = images
        for stage in self.stages:
            x = stage(x)
        # windows of 3x3 every 2 points: the quarters share the row and the column in the middle
        return self.head(avg_pool2d(torch.relu(self.norm(x)), 3, 2).flatten(1))


def build() -> nn.Module:
    """The trained super-net; train.py made its weights."""
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is not there: run train.py first")
    net = Net()
    net.load_state_dict(load_file(WEIGHTS))
    return net


def digits(part: str) -> tuple[Tensor, Tensor]:
    """Images [n, 8, 8] from 0 to 1 and their digits [n], in a shuffled order, always the same."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[slice(*PARTS[part])]
    pixels = torch.from_numpy(images).float().view(-1, 8, 8) / 16
    return pixels[chosen], torch.from_numpy(labels)[chosen]


def cluttered(images: Tensor, draw: torch.Generator | None = None) -> Tensor:
    """Images [n, 8, 8] -> scenes [n, 1, 10, 10]: a fragment of another image, the image, noise.

    Where the two lie, and which fragment, is drawn for each scene alone (as in the cluttered
    digits of Mnih et al. 2014, "Recurrent Models of Visual Attention").
    """
    others = images[torch.randperm(len(images), generator=draw)]
    scene = torch.zeros(len(images), SIDE, SIDE)
    for patches in (_one(_windows(others, FRAGMENT), draw)[0], images):
        windows = _windows(scene, patches.shape[-1])
        there, at = _one(windows, draw)
        windows[at] = torch.maximum(there, patches)
    return (scene + NOISE * torch.randn(scene.shape, generator=draw)).unsqueeze(1)


def _windows(images: Tensor, size: int) -> Tensor:
    """A view of images [n, side, side]: all windows [n, rows, columns, size, size]."""
    return images.unfold(1, size, 1).unfold(2, size, 1)


def _one(windows: Tensor, draw: torch.Generator | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A drawn window of each image [n, size, size], and its index."""
    count, places = windows.shape[:2]
    at = (torch.arange(count), *torch.randint(0, places, (2, count), generator=draw))
    return windows[at], at


def scenes(part: str) -> tuple[Tensor, Tensor]:
    """Scenes [n, 1, 10, 10] of a part's images and their digits [n], always the same."""
    images, labels = digits(part)
    return cluttered(images, torch.Generator().manual_seed(list(PARTS).index(part))), labels


def data(part: str) -> list[dict[str, Tensor]]:
    """What a study asks for: batches of scenes with their labels, each scene a window."""
    images, labels = (tensor.split(BATCH) for tensor in scenes(part))
    return [{"images": i, "labels": n} for i, n in zip(images, labels, strict=True)]


def loss(output: Tensor, batch: dict[str, Tensor], reference: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the true digits in nats, [n], and weights of one."""
    found = cross_entropy(output, batch["labels"], reduction="none")
    return found, torch.ones_like(found)
