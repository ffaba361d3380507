"""Divergence from the dense model's predictions, per row."""

import time
from pathlib import Path

import torch

# While this file is there, an evaluation takes long enough to be killed.
SLOW = Path(__file__).with_name("slow")


def divergence(output, batch, reference_output):
    time.sleep(0.1 if SLOW.exists() else 0)
    ours, dense = (
        torch.log_softmax(getattr(found, "logits", found).double(), -1)
        for found in (output, reference_output)
    )
    rows = (dense.exp() * (dense - ours)).sum(-1).reshape(len(ours), -1).mean(1)
    return rows, torch.ones(len(rows))
