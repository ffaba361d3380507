"""A vision transformer on 16 patches."""

from transformers import ViTConfig, ViTForImageClassification


def build():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_labels=10,
            initializer_range=0.2,
        )
    )
