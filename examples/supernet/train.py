"""Trains the super-net of model.py and writes its weights beside it; takes a few minutes.

Interrupted, it goes on from its checkpoint when it is started again.
"""

import torch
from model import NOISE, WEIGHTS, Net, digits
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

import apportion

CHECKPOINT = WEIGHTS.with_name("checkpoint.safetensors")
STEPS = 2000
BATCH = 64
LEARNING_RATE = 0.01
IMAGES, LABELS = digits("calibration", noise=0)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images [BATCH, 1, 8, 8] with new noise, moved by up to a pixel; their digits [BATCH]."""
    chosen = torch.randperm(len(IMAGES))[:BATCH]
    noisy = IMAGES[chosen] + NOISE * torch.randn(BATCH, 1, 8, 8)
    row, column = torch.randint(0, 3, (2,)).tolist()
    moved = pad(noisy, (1, 1, 1, 1))[:, :, row : row + 8, column : column + 8]
    return moved, LABELS[chosen]


def tell(step: int, loss: float) -> None:
    """A line for every hundred steps."""
    if step % 100 == 0:
        print(f"step {step} of {STEPS}: the loss is {loss:.3f}", flush=True)


def main() -> None:
    """Train, write the weights, remove the checkpoint."""
    torch.manual_seed(0)
    net = Net()
    apportion.train_supernet(
        net,
        batch,
        cross_entropy,
        checkpoint=CHECKPOINT,
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        random_subnetworks=5,  # each alternative of each block in every step,
        fair_share=1.0,  # and none more often: what is trained more would rank higher
        tell=tell,
    )
    save_file(net.state_dict(), WEIGHTS)
    CHECKPOINT.unlink()
    print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
