"""64 experts in 8 blocks; larger than usual at the start, so that words are told apart."""

from transformers import MixtralConfig, MixtralForCausalLM


def build():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=8,
            num_experts_per_tok=2,
            initializer_range=0.2,
        )
    )
