"""The artifact: what is loaded equals what was applied, its bytes are the promised ones."""

import copy
import json
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import apportion
from apportion.cost_models.static import weight_bytes
from apportion.errors import InvalidInput
from apportion.spaces.apply import apply, member_weight
from apportion.spaces.artifact import DESCRIPTION, REPORT, TENSORS, Plan, write
from apportion.spaces.batches import call, frozen, main_tensor
from apportion.spaces.calibration import collect
from apportion.spaces.compressors.compose import realize
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.loading import load
from apportion.spaces.stored import StoredSite

FAMILIES = ("llama", "qwen3", "opt", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
PYTHON = ("conv", "recurrent", "vision", "encoder")


def drawn(space, seed):
    """Random options at all weight sites, few drops."""
    generator = random.Random(seed)
    configuration = {}
    for site, row in zip(space.sites, space.texts, strict=True):
        keep = site.is_structure and generator.random() < 0.7
        configuration[site.name] = row[0] if keep else generator.choice(row)
    return configuration


@pytest.fixture
def written(make_model, full_space, make_plan, tmp_path):
    """family, configuration -> the folder, and the model with the configuration applied."""

    def build(family, configuration, name="artifact"):
        model, space = make_model(family), full_space(family)
        plan = make_plan(copy.deepcopy(model), space, configuration)
        hugging_face = hasattr(model, "save_pretrained")
        source = {"kind": "hf" if hugging_face else "python", "source": "there", "revision": "1"}

        def save_extra(folder):
            if hugging_face:
                model.config.save_pretrained(folder)
                model.generation_config.save_pretrained(folder)

        folder = tmp_path / name
        write(folder, model, plan, {**source, "dtype": "float32"}, {"loss": 0.5}, save_extra)
        apply(model, space, plan.configuration, plan.stored, plan.implementations)
        return folder, model

    return build


@torch.no_grad()
def output_of(model, batch):
    return main_tensor(call(model, batch))


def load_python(folder, make_model, family="conv"):
    return load(folder, model=lambda: type(make_model(family))())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_load_of_mixed_configurations_is_bit_equal(written, full_space, make_batch, family, seed):
    folder, model = written(family, drawn(full_space(family), seed))
    batch = make_batch(family)
    assert torch.equal(output_of(load(folder), batch), output_of(model, batch))


@pytest.mark.parametrize("family", PYTHON)
@pytest.mark.parametrize("seed", range(4))
def test_load_of_a_python_model_is_bit_equal(
    written, full_space, make_model, make_batch, family, seed
):
    folder, model = written(family, drawn(full_space(family), seed))
    loaded, batch = load_python(folder, make_model, family), make_batch(family)
    assert torch.equal(output_of(loaded, batch), output_of(model, batch))


@pytest.mark.parametrize("family", ["llama", "conv"])
def test_load_in_bfloat16_is_bit_equal(
    make_model, full_space, make_plan, make_batch, tmp_path, family
):
    model, space = make_model(family), full_space(family)
    if family == "conv":
        model.bfloat16()
    else:
        # Not model.bfloat16(): transformers keeps the rotary frequencies in float32.
        model.save_pretrained(tmp_path / "dense")
        model = frozen(type(model).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16))
    plan = make_plan(copy.deepcopy(model), space, drawn(space, 1), "bfloat16")
    kind = "python" if family == "conv" else "hf"
    extra = getattr(model, "config", None)
    save_extra = extra.save_pretrained if extra else lambda folder: None
    source = {"kind": kind, "source": "there", "revision": "1", "dtype": "bfloat16"}
    write(tmp_path / "artifact", model, plan, source, {}, save_extra)
    apply(model, space, plan.configuration, plan.stored, plan.implementations)
    build = None if kind == "hf" else lambda: type(make_model("conv"))()
    batch = make_batch(family)
    batch = batch.bfloat16() if family == "conv" else batch
    loaded = load(tmp_path / "artifact", model=build)
    assert torch.equal(output_of(loaded, batch), output_of(model, batch))


@pytest.mark.parametrize(
    "text, name",
    [("w4g32:awq", "linear.f32"), ("w4g32:awq", "int4pack.bf16"), ("w8:awq", "int8pack.bf16")],
)
def test_load_of_scaled_inputs_is_bit_equal(make_model, make_batch, tmp_path, text, name):
    model, batch = make_model("llama"), make_batch("llama")
    entries = [Entry(("*.self_attn.*", "*.mlp.*"), ("dense", text))]
    space = build_space(discover(model, batch).sites, entries)
    sites = {site.name: site for site in space.sites if site.members}
    seen = collect(model, list(sites.values()), [batch])
    weights = {m.module: member_weight(model, m).clone() for s in sites.values() for m in s.members}

    def stored(site, option):
        dense = [(weights[member.module], member.shape) for member in site.members]
        made = (realize(w, shape, option, seen[site.name], "float32") for w, shape in dense)
        return StoredSite(tuple(made))

    plan = Plan(space, dict.fromkeys(sites, text), stored, dict.fromkeys(sites, {text: name}))
    source = {"kind": "hf", "source": "there", "revision": "1", "dtype": "float32"}
    write(tmp_path / "artifact", model, plan, source, {}, model.config.save_pretrained)
    apply(model, space, plan.configuration, plan.stored, plan.implementations)
    loaded = load(tmp_path / "artifact")
    assert torch.equal(output_of(loaded, batch), output_of(model, batch))
    packed = [each for each in load_file(tmp_path / "artifact" / TENSORS) if "packed" in each]
    assert sum(each.endswith(".input_scale") for each in packed) == len(weights)


@pytest.mark.parametrize("family, name", [("llama", "model.layers.1.mlp"), ("conv", "blocks.1")])
def test_load_adds_the_constant_of_what_was_dropped(written, make_model, make_batch, family, name):
    folder, model = written(family, {name: "drop:mean"})
    loaded = load(folder) if family == "llama" else load_python(folder, make_model)
    batch = make_batch(family)
    assert torch.equal(output_of(loaded, batch), output_of(model, batch))
    dropped = output_of(written(family, {name: "drop"}, "dropped")[1], batch)
    assert not torch.allclose(output_of(loaded, batch), dropped, atol=1e-3)
    assert not [each for each in load_file(folder / TENSORS) if each.startswith(name + ".")][1:]


def test_load_keeps_tied_embeddings_tied_and_written_once(written):
    folder, _ = written("qwen3", {"model.layers.0.mlp.down_proj": "w8"})
    assert "lm_head.weight" not in load_file(folder / TENSORS)
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_load_keeps_generation_settings(written):
    folder, _ = written("llama", {})
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 7}))
    model = load(folder)
    assert model.generation_config.max_new_tokens == 7
    assert model.generate(torch.ones(1, 2, dtype=torch.long), min_new_tokens=7).shape == (1, 9)


def test_write_keeps_the_tokenizer(make_model, full_space, make_plan, tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "def": 1, "return": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    model, space = make_model("llama"), full_space("llama")
    plan = make_plan(model, space, {})
    write(tmp_path / "a", model, plan, {}, {}, tokenizer.save_pretrained)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    assert loaded("return def while")["input_ids"] == [2, 1, 0]


def test_load_is_ready_for_inference(written):
    model = load(written("llama", {"model.layers.1.mlp": "drop"})[0])
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "conv"])
@pytest.mark.parametrize("seed", range(3))
def test_written_payload_is_what_static_costs_promise(
    written, full_space, make_model, family, seed
):
    space = full_space(family)
    folder, _ = written(family, drawn(space, seed))
    payload = sum(t.numel() * t.element_size() for t in load_file(folder / TENSORS).values())
    cost = weight_bytes(make_model(family), space)
    configuration = json.loads((folder / DESCRIPTION).read_text())["configuration"]
    config = space.config(configuration)
    live = [place for place in range(len(config)) if not space.void(config, place)]
    assert payload == cost.base + sum(cost.rows[place, config[place]] for place in live)


def test_write_refuses_an_existing_folder(written):
    written("conv", {})
    with pytest.raises(InvalidInput, match="exists already"):
        written("conv", {})


def test_write_keeps_folders_of_extra_files(make_model, full_space, make_plan, tmp_path):
    def save_extra(folder):
        (folder / "chat_templates").mkdir()
        (folder / "chat_templates" / "tool.jinja").write_text("{{ x }}")

    model, space = make_model("conv"), full_space("conv")
    write(tmp_path / "a", model, make_plan(model, space, {}), {}, {"loss": 1}, save_extra)
    assert (tmp_path / "a" / "chat_templates" / "tool.jinja").read_text() == "{{ x }}"
    assert json.loads((tmp_path / "a" / REPORT).read_text()) == {"loss": 1}


def test_write_that_fails_half_way_leaves_nothing(make_model, full_space, make_plan, tmp_path):
    def save_extra(folder):
        (folder / "tokenizer.json").write_text("{}")
        raise OSError("disk full")

    model, space = make_model("conv"), full_space("conv")
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a", model, make_plan(model, space, {}), {}, {}, save_extra)
    assert list(tmp_path.iterdir()) == []


def test_load_imports_no_part_of_the_search(written):
    folder, _ = written("llama", {"model.layers.0.mlp.down_proj": "w4g32"})
    program = (
        "import sys, torch, apportion; model = apportion.load(sys.argv[1]);"
        "model(torch.ones(1, 2, dtype=torch.long));"
        "print(sorted({m.split('.')[0] for m in sys.modules}"
        " & {'sqlalchemy', 'ray', 'optuna', 'pulp', 'pydantic', 'typer', 'highspy'}),"
        " sorted(m for m in sys.modules if m.startswith("
        "('apportion.search', 'apportion.cost_', 'apportion.work', 'apportion.studies'))))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "[] []\n"


def test_load_is_a_public_name():
    assert apportion.load is load


def describe_otherwise(change):
    def damage(folder):
        described = json.loads((folder / DESCRIPTION).read_text())
        change(described)
        (folder / DESCRIPTION).write_text(json.dumps(described))

    return damage


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return damage


def truncate(folder):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


PACKED = "model.layers.0.mlp.down_proj.packed."
DAMAGES = {
    "truncated": (truncate, f"{TENSORS} cannot be read"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"{TENSORS} cannot be read"),
    "no description": (lambda f: (f / DESCRIPTION).unlink(), f"holds no {DESCRIPTION}"),
    "no json": (lambda f: (f / DESCRIPTION).write_text("{"), "cannot be read"),
    "a list": (lambda f: (f / DESCRIPTION).write_text("[]"), "format version None"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "config with code": (
        lambda f: (f / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}'),
        "config.json cannot be read",
    ),
    "missing tensor": (
        change_tensors(lambda t: t.pop("model.norm.weight")),
        f"tensors missing from {TENSORS}: model.norm.weight",
    ),
    "missing constant": (
        change_tensors(lambda t: t.pop("model.layers.2.constant")),
        "'model.layers.2.constant'",
    ),
    "constant of another shape": (
        change_tensors(lambda t: t.update({"model.layers.2.constant": torch.zeros(3)})),
        "size mismatch for model.layers.2.constant",
    ),
    "missing packed tensor": (change_tensors(lambda t: t.pop(PACKED + "zero")), "'zero'"),
    "missing member": (
        change_tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith(PACKED)]),
        "stored weight: holds []",
    ),
    "extra tensor": (
        change_tensors(lambda t: t.update(other=torch.zeros(1))),
        "tensors the model does not have: other",
    ),
    "extra packed tensor": (
        change_tensors(lambda t: t.update({"a.packed.codes": torch.zeros(1)})),
        "tensors the model does not have: a.packed.codes",
    ),
    "another shape": (
        change_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
        "size mismatch for model.norm.weight",
    ),
    "another format version": (
        describe_otherwise(lambda d: d.update(format_version=2)),
        "format version 2; this version reads 1",
    ),
    "unknown implementation": (
        describe_otherwise(lambda d: d["sites"][0].update(implementation="magic.f32")),
        "unknown implementation 'magic.f32'",
    ),
    "unfit implementation": (
        describe_otherwise(lambda d: d["sites"][0].update(implementation="conv.f32")),
        "conv.f32",
    ),
    "unknown module": (
        describe_otherwise(lambda d: d["dropped"][0].update(name="model.layers.9")),
        "damaged or of another model",
    ),
    "unknown format field": (
        describe_otherwise(lambda d: d["sites"][0]["members"][0]["format"].update(magic=1)),
        "unknown field 'magic'",
    ),
    "no sites": (describe_otherwise(lambda d: d.pop("sites")), "it lacks sites"),
    "no dtype": (describe_otherwise(lambda d: d["model"].pop("dtype")), "it lacks the model"),
    "odd dtype": (
        describe_otherwise(lambda d: d["model"].update(dtype="load")),
        "dtype is not one of float32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_of_a_damaged_folder_says_so_in_one_line(written, damage):
    configuration = {"model.layers.0.mlp.down_proj": "w4g32", "model.layers.1": "drop"}
    folder, _ = written("llama", configuration | {"model.layers.2": "drop:mean"})
    harm, told = DAMAGES[damage]
    harm(folder)
    with pytest.raises(InvalidInput) as error:
        load(folder)
    assert told in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_load_of_no_folder_says_so(tmp_path, place):
    (tmp_path / "file").write_text("text")
    with pytest.raises(InvalidInput) as error:
        load(tmp_path / place)
    assert place in str(error.value) and "\n" not in str(error.value)


def test_load_of_a_python_model_without_build_names_the_call(written):
    with pytest.raises(InvalidInput, match=r"apportion\.load\(folder, model=build\)"):
        load(written("conv", {})[0])


def test_load_of_another_python_model_is_refused(written):
    with pytest.raises(InvalidInput, match="of another model: tensors the model does not have"):
        load(written("conv", {})[0], model=lambda: nn.Sequential(nn.Linear(2, 2)))
