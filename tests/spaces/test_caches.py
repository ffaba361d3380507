"""Which attention has a cache that can be packed, and models that hold packed ones."""

import copy

import pytest
import torch
import transformers
from torch import nn

from apportion.cost_models.cache_bytes import cache_bytes, has_caches
from apportion.cost_models.static import resident_cost, weight_bytes
from apportion.errors import InvalidInput
from apportion.spaces.apply import apply
from apportion.spaces.artifact import Plan, contents, write
from apportion.spaces.batches import frozen
from apportion.spaces.caches import find_caches, named_caches
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space
from apportion.spaces.grammar import parse_option
from apportion.spaces.loading import load
from apportion.spaces.sites import Cached

HIDDEN, WORDS, HEAD = 32, 96, 8
SIZES = dict(hidden_size=HIDDEN, vocab_size=WORDS, num_hidden_layers=2, num_attention_heads=4)
GROUPED = SIZES | dict(intermediate_size=40, num_key_value_heads=2)
ENTRIES = [Entry(("attention:*",), ("keep", "drop")), Entry(("cache:*",), ("k8v8", "k4v2"))]


def of(name, task="ForCausalLM", **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return frozen(getattr(transformers, name + task)(config))


def gpt2():
    return of(
        "GPT2", "LMHeadModel", n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=99, vocab_size=WORDS
    )


MODELS = {
    "llama": (lambda: of("Llama", **GROUPED), "past_key_values", 2),
    "qwen3": (lambda: of("Qwen3", **GROUPED, head_dim=HEAD), "past_key_values", 2),
    "gpt2": (gpt2, "past_key_values", 4),
    "phi3": (lambda: of("Phi3", **GROUPED, pad_token_id=0, eos_token_id=2), "past_key_values", 2),
    "neox": (lambda: of("GPTNeoX", **SIZES, intermediate_size=40), "layer_past", 4),
}


class Plain(nn.Module):
    """A block whose attention is its author's own and knows no cache."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh())

    def forward(self, x):
        return x + self.attention(x)


def ids(tokens=40, batch=2):
    draw = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(1, WORDS, (batch, tokens), generator=draw)}


def caches_of(model, batch=None):
    batch = ids() if batch is None else batch
    return find_caches(model, batch, discover(model, batch).sites)


def space_of(model, entries=ENTRIES):
    found = discover(model, ids())
    return build_space(named_caches(model, ids(), found.sites, entries).among(found.sites), entries)


def packed(model, space, option):
    """A copy of the model all caches of which hold an option."""
    made = copy.deepcopy(model)
    chosen = {site.name: option for site in space.sites if site.cache}
    apply(made, space, chosen, lambda *_: None, {})
    return made


@pytest.mark.parametrize("name", MODELS)
def test_cache_of_attention_is_found_by_running_it(name):
    build, keyword, heads = MODELS[name]
    model = build()
    found = caches_of(model)
    assert found.refused == {}
    attention = [s.name for s in discover(model, ids()).sites if s.kind == "attention"]
    assert list(found.sites) == attention
    for layer, (path, site) in enumerate(found.sites.items()):
        assert (site.name, site.kind, site.parent) == (f"{path}.cache", "cache", path)
        assert site.cache == Cached(keyword, layer, heads, HEAD, HEAD)


def test_a_model_that_was_saved_without_a_cache_has_one():
    model = of("Llama", **GROUPED, use_cache=False)
    assert len(caches_of(model).sites) == 2 and not model.config.use_cache


@pytest.mark.parametrize(
    ("build", "batch", "reason"),
    [
        (
            lambda: of("Bert", "ForMaskedLM", **SIZES, intermediate_size=40),
            None,
            "gives it no cach",
        ),
        (
            lambda: of("ViT", "ForImageClassification", **SIZES, image_size=16, patch_size=4),
            torch.randn(2, 3, 16, 16),
            "gives it no cache",
        ),
        (lambda: frozen(nn.Sequential(Plain(), Plain())), torch.randn(2, 5, HIDDEN), "no cache"),
        (lambda: of("Mistral", **GROUPED, sliding_window=9), None, "DynamicSlidingWindowLayer"),
    ],
    ids=["bert", "vit", "own code", "sliding window"],
)
def test_attention_without_a_cache_that_can_be_packed_says_why(build, batch, reason):
    model = build()
    found = caches_of(model, batch)
    assert not found.sites and len(found.refused) == 2
    assert all(reason in why for why in found.refused.values())
    batch = ids() if batch is None else batch
    with pytest.raises(
        InvalidInput, match=r"space\[2\].options: no cache of this model.*" + reason
    ):
        named_caches(model, batch, discover(model, batch).sites, ENTRIES)


def test_attention_that_ignores_what_the_cache_gives_has_none():
    model = of("Llama", **GROUPED)
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def ignoring(*args, past_key_values=None, **keywords):
        if past_key_values is not None:
            given = torch.zeros(*args[0].shape[:1] if args else (2,), 2, 40, HEAD)
            past_key_values.update(given, given, 0)
        return forward(*args, **keywords)

    attention.forward = ignoring
    found = caches_of(model)
    # It attends to fewer keys than the mask is for.
    assert "it cannot be run" in found.refused["model.layers.0.self_attn"]


def test_caches_are_sites_only_where_an_entry_has_options_for_them():
    model = of("Llama", **GROUPED)
    sites = discover(model, ids()).sites
    everything = [Entry(("*",), ("keep", "drop", "dense", "w8"), True)]
    assert named_caches(model, ids(), sites, everything) is None
    assert not has_caches(build_space(sites, everything))
    space = space_of(model, [*everything, Entry(("*.self_attn.cache",), ("keep", "k4v4"))])
    rows = dict(zip(space.names, space.texts, strict=True))
    assert rows["model.layers.1.self_attn.cache"] == ("keep", "k4v4")
    assert space.parent[space.index("model.layers.1.self_attn.cache")] == space.index(
        "model.layers.1.self_attn"
    )


def test_only_caches_take_their_options():
    model = of("Llama", **GROUPED)
    with pytest.raises(InvalidInput, match='"k4v4" is for none of the sites'):
        space_of(model, [Entry(("*.mlp.*",), ("w8", "k4v4"))])
    with pytest.raises(InvalidInput, match='"w8" is for none of the sites'):
        space_of(model, [Entry(("cache:*",), ("w8", "k4v4"))])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("k5v4", "2, 3, 4, 8 bits"),
        ("k04v4", "write k4v4"),
        ("k4v4+w8", '"k4v4" stands alone and takes no steps'),
        ("k4", "nearest: k4v4"),
    ],
)
def test_wrong_options_of_caches_are_told(text, told):
    with pytest.raises(InvalidInput, match=told):
        parse_option(text)


def test_options_of_caches_are_read_as_they_are_written():
    for keys in (2, 3, 4, 8):
        option = parse_option(f"k{keys}v2")
        assert (str(option), option.cache_bits, option.steps) == (f"k{keys}v2", (keys, 2), ())
        assert option.is_structure and not option.needs_statistics


def test_one_option_everywhere_leaves_weights_dense():
    model = of("Llama", **GROUPED)
    space = space_of(model, [*ENTRIES, Entry(("*.mlp.*",), ("dense", "w8"))])
    stored = [{text: 1 for text in row} for row in space.texts]
    both = [space.configuration(space.uniform(text, stored)) for text in ("k4v2", "w8")]
    used = [{text for text in each.values()} - {"keep", "dense"} for each in both]
    assert used == [{"k4v2"}, {"w8"}]


@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_are_held_packed_and_close_to_the_dense_ones(name):
    model = MODELS[name][0]()
    space = space_of(model)
    made = packed(model, space, "k8v8")
    words = dict(max_new_tokens=25, min_new_tokens=25, do_sample=False, pad_token_id=0)
    words |= dict(return_dict_in_generate=True, output_logits=True)
    dense, found = (each.generate(**ids(), **words) for each in (model, made))
    last = [torch.stack(each.logits)[:3] for each in (dense, found)]
    assert (last[0] - last[1]).norm() < 0.01 * last[0].norm()
    layers = found.past_key_values.layers
    assert {layer.get_seq_length() for layer in layers} == {64}
    held = sum(layer.packed.packed_bytes for layer in layers)
    everywhere = space.config({s.name: "k8v8" for s in space.sites if s.cache})
    cost = cache_bytes(model, space, space.sites)
    each = sum(cost.rows[place, option] for place, option in enumerate(everywhere)) + cost.base
    assert held == 2 * 64 * each


def test_a_pass_over_a_window_attends_to_what_a_cache_would_hold():
    model = of("Llama", **GROUPED)
    made = packed(model, space_of(model), "k4v2")
    alone, cached = (made(**ids(), use_cache=use).logits for use in (False, True))
    assert torch.equal(alone, cached)
    assert not torch.equal(alone, model(**ids()).logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_one_pass_gives_what_its_tokens_give_one_by_one(name, steps):
    model = MODELS[name][0]()
    made = packed(model, space_of(model), "k4v2")
    prompt, cache, found = ids(80)["input_ids"], None, []
    for part in prompt.split(steps, 1):
        output = made(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    whole = made(prompt, use_cache=False).logits
    difference = (whole - model(prompt).logits).norm()
    assert (torch.cat(found, 1) - whole).norm() < 0.01 * difference


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_padding_stays_hidden(way):
    model = of("Llama", **GROUPED)
    model.set_attn_implementation(way)
    made = packed(model, space_of(model), "k8v8")
    prompt = ids(50, batch=1)["input_ids"]
    padded = torch.cat([torch.zeros(1, 32, dtype=torch.int64), prompt], 1)
    mask = (torch.arange(82) >= 32).long()[None]
    places = (mask.cumsum(-1) - 1).clamp(0)
    alone = made(prompt).logits
    beside = made(padded, attention_mask=mask, position_ids=places).logits[:, 32:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)


def test_bytes_of_a_token_follow_what_attention_keeps():
    model = of("Llama", **GROUPED)
    one = Entry(("model.layers.0.self_attn.cache",), ("k8v8",))
    space = space_of(model, [Entry(("attention:*",), ("keep", "drop", "c50%")), one])
    found = caches_of(model)
    sites = found.among(discover(model, ids()).sites)
    cost = cache_bytes(model, space, sites)
    dense = 2 * (HEAD + HEAD) * 4

    def total(chosen):
        config = space.config(chosen)
        void = space.voids(config)
        kept = [p for p in range(len(config)) if not void[p]]
        return cost.base + sum(cost.rows[p, config[p]] for p in kept)

    first, second = (f"model.layers.{layer}.self_attn" for layer in (0, 1))
    assert total({}) == 2 * dense
    assert total({f"{first}.cache": "k8v8"}) == dense + 2 * (8 + 2 * 4 * 8 / 64 + 8 + 4)
    assert total({first: "drop"}) == total({second: "drop"}) == dense
    assert total({first: "c50%", second: "c50%"}) == dense


def test_a_packed_cache_takes_no_bytes_of_weights():
    model = of("Llama", **GROUPED)
    space = space_of(model, ENTRIES[1:])
    for cost in (weight_bytes(model, space), resident_cost(model, space, {})):
        assert not cost.rows.any() and cost.base > 0


def test_exported_folder_says_which_caches_are_packed(tmp_path):
    model = of("Llama", **GROUPED)
    space = space_of(model)
    first, second = (f"model.layers.{layer}.self_attn" for layer in (0, 1))
    chosen = space.canonical({f"{first}.cache": "k4v2", f"{second}.cache": "keep"})
    plan = Plan(space, chosen, lambda *_: None, {})
    assert [each["name"] for each in contents(model, plan)[1]["caches"]] == [first]
    model.config.save_pretrained(tmp_path)
    source = {"kind": "hf", "source": "x", "revision": "", "dtype": "float32"}
    save = model.config.save_pretrained
    write(tmp_path / "out", model, plan, source, {}, save)
    wanted = copy.deepcopy(model)
    apply(wanted, space, chosen, lambda *_: None, {})
    assert torch.equal(load(tmp_path / "out")(**ids()).logits, wanted(**ids()).logits)
    dropped = Plan(space, space.canonical(chosen | {first: "drop"}), lambda *_: None, {})
    assert "caches" not in contents(model, dropped)[1]
