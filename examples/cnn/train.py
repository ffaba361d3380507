"""Trains the network of model.py and writes its weights beside it; takes less than a minute."""

import torch
from model import WEIGHTS, Net, digits
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

EPOCHS = 30
BATCH = 50
PEAK = 4e-3


def shifted(images: Tensor) -> Tensor:
    """The images moved by up to one pixel, [n, 1, 8, 8]."""
    row, column = torch.randint(0, 3, (2,)).tolist()
    return pad(images, (1, 1, 1, 1))[:, :, row : row + 8, column : column + 8]


@torch.no_grad()
def accuracy(net: nn.Module, part: str) -> float:
    """The share of right answers."""
    images, labels = digits(part)
    return (net.eval()(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    """Train, print the accuracy, write the weights."""
    torch.manual_seed(0)
    images, labels = digits("calibration")
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = EPOCHS * len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(BATCH):
            loss = cross_entropy(net(shifted(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for part in ("calibration", "search", "heldout"):
        print(f"{part}: {accuracy(net, part):.3f} right")
    save_file(net.state_dict(), WEIGHTS)
    print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
