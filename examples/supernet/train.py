"""Trains the super-net of model.py and writes its weights beside it; takes a few minutes.

Interrupted, it goes on from its checkpoint when it is started again.
"""

import torch
from model import WEIGHTS, Net, cluttered, digits
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import apportion

CHECKPOINT = WEIGHTS.with_name("checkpoint.safetensors")
STEPS = 1600
BATCH = 64
LEARNING_RATE = 0.01
IMAGES, LABELS = digits("calibration")


def batch(step: int) -> tuple[Tensor, Tensor]:
    """New scenes [BATCH, 1, 10, 10] of drawn images; their digits [BATCH]."""
    chosen = torch.randperm(len(IMAGES))[:BATCH]
    return cluttered(IMAGES[chosen]), LABELS[chosen]


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
        random_subnetworks=7,  # each alternative of each block in every step,
        fair_share=1.0,  # and none more often: what is trained more would rank higher
        tell=tell,
    )
    save_file(net.state_dict(), WEIGHTS)
    CHECKPOINT.unlink()
    print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
