"""A language model with random weights, wide enough that a bank of it takes minutes."""

import torch
from torch import Tensor, nn

HIDDEN, INNER, BLOCKS, VOCABULARY = 512, 2048, 6, 256
WINDOWS, CONTEXT = 16, 256


def build() -> nn.Module:
    """The model: its values do not change what a compressor takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def windows(part: str) -> list[Tensor]:
    """Random tokens, [1, CONTEXT] each."""
    generator = torch.Generator().manual_seed(len(part))
    return [
        torch.randint(VOCABULARY, (1, CONTEXT), generator=generator)
        for _ in range(WINDOWS if part == "calibration" else 1)
    ]
