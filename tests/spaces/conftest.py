"""Tiny random models of every family that spaces must understand, and how to compress them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from apportion.kernels.formats import DTYPES
from apportion.kernels.registry import serving
from apportion.spaces.apply import member_weight
from apportion.spaces.artifact import Plan
from apportion.spaces.batches import frozen
from apportion.spaces.compressors.compose import realize
from apportion.spaces.compressors.treatment import realize_treatment
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.parts import parts
from apportion.spaces.space import Space
from apportion.spaces.stored import StoredSite

LAYERS, WIDTH, WORDS = 3, 32, 96
FAMILIES = ("llama", "qwen3", "opt", "gpt2")
TREATMENTS = ("c50%", "c50%+w8", "c75%+s50%", "c50%+w4g16+r4")
WEIGHTS = ("dense", "bf16", "w4g32", "w4g16s", "w8", "s50%", "r50%", "w3g32+r4", "s50%+w4g32")


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=WIDTH, intermediate_size=64, vocab_size=WORDS)
    heads = dict(num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


def _qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(hidden_size=WIDTH, intermediate_size=64, vocab_size=WORDS, head_dim=16)
    heads = dict(num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True))


def _opt():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(hidden_size=WIDTH, ffn_dim=64, word_embed_proj_dim=WIDTH, vocab_size=WORDS)
    heads = dict(num_hidden_layers=LAYERS, num_attention_heads=2, max_position_embeddings=64)
    return OPTForCausalLM(OPTConfig(**sizes, **heads))


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=64, vocab_size=WORDS)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def _bert():
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(hidden_size=WIDTH, intermediate_size=64, vocab_size=WORDS)
    heads = dict(num_hidden_layers=LAYERS, num_attention_heads=2, max_position_embeddings=64)
    return BertForMaskedLM(BertConfig(**sizes, **heads))


class Residual(nn.Module):
    """A block that adds its input itself."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.second(torch.relu(self.norm(self.first(x))))


class ConvNet(nn.Module):
    """Images `[batch, 3, 8, 8]` -> scores `[batch, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Residual(16), Residual(16, groups=4))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MIXTURE = dict(hidden_size=WIDTH, intermediate_size=64, vocab_size=WORDS, num_hidden_layers=2)
MIXTURE |= dict(num_attention_heads=2, num_key_value_heads=1)


def _mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=4))


def _qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(**MIXTURE, **EXPERTS, shared_expert_intermediate_size=64)
    return Qwen2MoeForCausalLM(config)


def _qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE, **EXPERTS, head_dim=16))


def _gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**MIXTURE, num_local_experts=4, head_dim=16))


class Recurrent(nn.Module):
    """Word numbers `[batch, tokens]` -> scores `[batch, tokens, words]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.memory = nn.LSTM(WIDTH, 16, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids):
        return self.head(self.memory(self.embed(input_ids))[0])


class VisionBlock(nn.Module):
    """Attention of torch's own and an MLP, each beside its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Vision(nn.Module):
    """Signals `[batch, 4, 16]` -> scores `[batch, 10]`: patches by a Conv1d, then two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv1d(4, WIDTH, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.blocks = nn.ModuleList([VisionBlock(), VisionBlock()])
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        x = self.patches(x).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """`[batch, tokens, 32]` -> the same; torch's encoder reads its layers' weights itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(x)


MAKERS = dict(llama=_llama, qwen3=_qwen3, opt=_opt, gpt2=_gpt2, bert=_bert, conv=ConvNet)
MAKERS |= dict(mixtral=_mixtral, qwen2_moe=_qwen2_moe, qwen3_moe=_qwen3_moe, gpt_oss=_gpt_oss)
MAKERS |= dict(recurrent=Recurrent, vision=Vision, encoder=Encoder)
INPUTS = dict(conv=(3, 8, 8), vision=(4, 16), encoder=(12, WIDTH))


def _make(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = frozen(MAKERS[family]())
    for name, value in model.named_parameters():
        # Biases and norms that are not what they start as, so that losing one is seen.
        if value.ndim == 1:
            value.add_(0.1 * torch.randn_like(value))
        elif "embed" not in name:
            value.mul_(4)
    return model


def _batch(family: str, tokens: int = 12):
    generator = torch.Generator().manual_seed(1)
    if family in INPUTS:
        return torch.randn(2, *INPUTS[family], generator=generator)
    return {"input_ids": torch.randint(3, WORDS, (2, tokens), generator=generator)}


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], nn.Module]:
    """family -> a fresh model with the same random weights each time."""
    return _make


@pytest.fixture(scope="session")
def make_batch():
    """family -> one batch of it."""
    return _batch


@pytest.fixture(scope="session")
def full_space() -> Callable[[str], Space]:
    """family -> every weight site and sub-block with all options that fit it."""
    made: dict[str, Space] = {}

    def build(family: str) -> Space:
        if family not in made:
            sites = discover(_make(family), _batch(family)).sites
            entries = [
                Entry(("*",), WEIGHTS, skip_unfit=True),
                Entry(("*",), ("keep", "drop", "drop:mean", *TREATMENTS), skip_unfit=True),
            ]
            made[family] = build_space(sites, entries)
        return made[family]

    return build


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """A plan without statistics that takes the first implementation that serves."""

    def stored(model, dtype):
        def of(site, option):
            if str(option) == "drop:mean":
                constant = torch.linspace(-1, 1, max(site.constant)).to(DTYPES[dtype])
                return StoredSite((), constant=constant.view(site.constant))
            weights = [member_weight(model, m).float() for group in site.groups for m in group]
            if option.narrows:
                unknown = [None] * len(site.groups)
                return realize_treatment(weights, site.width, option, unknown, dtype)
            pairs = zip(weights, site.members, strict=True)
            made = (realize(weight, m.shape, option, None, dtype) for weight, m in pairs)
            return StoredSite(tuple(made))

        return of

    def build(model, space, configuration, dtype="float32"):
        names = {
            site.name: {
                str(option): serving(part.formats[0], part.shapes, "cpu")[0].name
                for option in row
                if (option.narrows and not site.has_experts)
                or (site.members and str(option) != "dense")
                for part in parts(site, option, dtype)
            }
            for site, row in zip(space.sites, space.options, strict=True)
        }
        return Plan(space, space.canonical(configuration), stored(model, dtype), names)

    return build
