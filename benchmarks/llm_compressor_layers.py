"""Compresses a model with llm-compressor and writes what became of its layers.

Runs in an environment of its own that has llm-compressor and not apportion (see
`llm_compressor.py`, which starts it). Every recipe begins with the dense model, and the pipeline is
"basic": all layers are calibrated on the inputs that they have in the dense model, not on those
that the compressed layers before them give.

Run: PYTHON benchmarks/llm_compressor_layers.py MODEL TOKENS OUT: the Hugging Face folder of a
model, a safetensors file with `tokens` int64 [windows, context], and a folder. Writes for each
recipe a file PLACE.safetensors, the recipe's name in its header: for each layer `.weight` [out, in]
and after GPTQ `.scale` and `.zero` [out, groups], a code q standing for (q - zero) x scale.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WINDOWS = 16  # of one forward pass
LAYERS = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
HALF, MORE = {"sparsity": 0.5, "mask_structure": "2:4"}, {"sparsity": 0.6}


def gptq(bits: int, group: int | None, order: str | None) -> GPTQModifier:
    """GPTQ with zeros and the ranges that are llm-compressor's default: minimum to maximum."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": False, **strategy}
    groups = {"all": {"targets": LAYERS["targets"], "weights": weights}}
    return GPTQModifier(config_groups=groups, ignore=LAYERS["ignore"], actorder=order)


RECIPES = {
    "w4g64:gptq": lambda: gptq(4, 64, "static"),
    "w3g64:gptq": lambda: gptq(3, 64, "static"),
    "w3:gptq": lambda: gptq(3, None, "static"),
    "w3g64:gptq natural order": lambda: gptq(3, 64, None),
    "s60%:sparsegpt": lambda: SparseGPTModifier(**MORE, **LAYERS),
    "2:4:sparsegpt": lambda: SparseGPTModifier(**HALF, **LAYERS),
    "s60%:wanda": lambda: WandaPruningModifier(**MORE, **LAYERS),
    "2:4:wanda": lambda: WandaPruningModifier(**HALF, **LAYERS),
}


def compressed(folder: str, tokens: torch.Tensor, recipe: Modifier) -> dict[str, torch.Tensor]:
    """The tensors of every layer in a block, by their names in the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batches = [{"input_ids": part} for part in tokens.split(WINDOWS)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    oneshot(model=model, dataset=loader, recipe=recipe, pipeline="basic")
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            continue
        found[f"{name}.weight"] = layer.weight.detach().float()
        if hasattr(layer, "weight_scale"):
            found[f"{name}.scale"] = layer.weight_scale.detach().float()
            found[f"{name}.zero"] = layer.weight_zero_point.detach().float()
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def main() -> None:
    """Run every recipe; a file that is there is not made again."""
    folder, tokens, out = sys.argv[1], load_file(sys.argv[2])["tokens"], Path(sys.argv[3])
    torch.set_num_threads(1)
    told = {"llmcompressor": version("llmcompressor"), "torch": version("torch")}
    for place, (name, recipe) in enumerate(RECIPES.items()):
        path = out / f"{place}.safetensors"
        if path.is_file():
            continue
        tensors = compressed(folder, tokens, recipe())
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata=told | {"recipe": name})
        part.replace(path)


if __name__ == "__main__":
    main()
