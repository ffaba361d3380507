"""Spaces: which entry decides, what patterns name, and what configurations mean."""

import random
from dataclasses import replace

import pytest

from apportion.cost_models.static import site_bytes
from apportion.errors import InvalidInput
from apportion.spaces.discovery import discover
from apportion.spaces.entries import Entry, build_space

QKV = "model.layers.{}.self_attn.q_proj+k_proj+v_proj"
EVERYTHING = [Entry(("*",), ("w4g32", "w8")), Entry(("*",), ("keep", "drop"))]


@pytest.fixture(scope="module")
def sites(make_model, make_batch):
    return discover(make_model("llama"), make_batch("llama")).sites


@pytest.fixture(scope="module")
def space(sites):
    return build_space(sites, EVERYTHING)


def names(space):
    return {site.name for site in space.sites}


def refused(sites, *entries):
    with pytest.raises(InvalidInput) as error:
        build_space(sites, entries)
    return str(error.value).split("\n")


def test_build_space_first_matching_entry_decides(sites):
    entries = [Entry((QKV.format(1),), ("w8",)), Entry(("*",), ("w4g32", "w3"))]
    space = build_space(sites, entries)
    assert space.texts[space.index(QKV.format(1))] == ("dense", "w8")
    assert space.texts[space.index(QKV.format(0))] == ("dense", "w4g32", "w3")


def test_build_space_entry_for_structure_leaves_weights_to_the_next(sites):
    space = build_space(sites, [Entry(("*",), ("drop",)), Entry(("*",), ("w8",))])
    assert {space.texts[i] for i in space.weight_sites} == {("dense", "w8")}
    structure = set(range(len(space.sites))) - set(space.weight_sites)
    assert {space.texts[i] for i in structure} == {("keep", "drop")}


def test_build_space_puts_the_neutral_option_first_and_each_option_once(sites):
    space = build_space(sites, [Entry(("*.mlp.*",), ("w8", "dense", "w4g32", "w8"))])
    assert set(space.texts) == {("dense", "w8", "w4g32")}


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (QKV.format(2), {QKV.format(2)}),
        ("model.layers.2.self_attn.k_proj", {QKV.format(2)}),
        ("*.o_proj", {f"model.layers.{i}.self_attn.o_proj" for i in range(3)}),
        ("linear:*.2.mlp.down*", {"model.layers.2.mlp.down_proj"}),
        ("mlp:*.0.*", {f"model.layers.0.mlp.{n}" for n in ("gate_proj+up_proj", "down_proj")}),
        ("lm_head", {"lm_head"}),
    ],
)
def test_build_space_pattern_names_sites(sites, pattern, expected):
    assert names(build_space(sites, [Entry((pattern,), ("w8",))])) == expected


@pytest.mark.parametrize("pattern", ["*", "linear:*"])
def test_build_space_catch_all_leaves_the_output_head(sites, pattern):
    assert "lm_head" not in names(build_space(sites, [Entry((pattern,), ("w8",))]))


def test_build_space_sub_block_pattern_means_all_weights_below(sites):
    space = build_space(sites, [Entry(("*.1.mlp", "block:*.2"), ("keep", "drop", "w8"))])
    one = {"model.layers.1.mlp", *(f"model.layers.1.mlp.{n}" for n in ("gate_proj+up_proj",))}
    one.add("model.layers.1.mlp.down_proj")
    # The sub-blocks of block 2 are not named: only its weights and the block itself.
    leaves = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj")
    two = {f"model.layers.2.{leaf}" for leaf in (*leaves, "mlp.down_proj")} | {"model.layers.2"}
    assert names(space) == one | two


@pytest.mark.parametrize(
    "pattern, told",
    [
        ("*.self_attm.*", 'nearest: "*.self_attn.*" (6 sites)'),
        ("*.mpl", 'nearest: "*.mlp" (3 sites)'),
        ("lm_haed", 'nearest: "lm_head" (1 site)'),
        ("conv:*", '"conv:*" matches no site'),
    ],
)
def test_build_space_unmatched_pattern_names_the_nearest(sites, pattern, told):
    (line,) = refused(sites, Entry(("*",), ("w8",)), Entry((pattern,), ("w8",)))
    assert line.startswith(f'space[2].sites: "{pattern}" matches no site') and told in line


@pytest.mark.parametrize("option", ["drop", "c75%", "op:skip"])
def test_build_space_an_option_that_no_named_site_takes_is_told(sites, option):
    (line,) = refused(sites, Entry(("*.down_proj",), ("dense", "w8", option)))
    assert line.startswith(
        f'space[1].options: "{option}" is for none of the sites that the entry names; keep, drop'
    )
    entry = Entry(("*.down_proj",), ("dense", "w8", option), skip_unfit=True)
    assert {text for row in build_space(sites, [entry]).texts for text in row} == {"dense", "w8"}


def test_build_space_an_option_for_sites_that_another_entry_decides_is_no_mistake(sites):
    entries = [Entry(("*.down_proj",), ("dense", "w4")), Entry(("*.down_proj",), ("dense", "w8"))]
    assert {text for row in build_space(sites, entries).texts for text in row} == {"dense", "w4"}


def test_build_space_options_of_another_kind_are_told(sites):
    (line,) = refused(sites, Entry(("*.down_proj",), ("keep", "drop")))
    assert line == (
        'space[1].sites: "*.down_proj" names only sites that no option here is for; '
        "keep, drop and drop:mean are for blocks and sub-blocks, cP% for those of them whose width "
        "can change, vP% for attention whose values can, qP% where queries and keys can (apportion "
        "sites), op:NAME for choice blocks, kNvM for caches, all others for weights"
    )


def test_build_space_unfit_option_counts_its_sites_and_names_what_fits(sites):
    (line,) = refused(sites, Entry(("*.mlp.*",), ("w4g48", "w8")))
    assert line == (
        'space[1].options: "w4g48" does not fit 6 sites: '
        "group 48 does not divide 32 inputs; nearest: w4g32"
    )


def test_build_space_lists_every_problem(sites):
    lines = refused(sites, Entry(("*.mlp.*",), ("w4g", "fp16", "w4g48")), Entry(("no",), ("w8",)))
    assert len(lines) == 4
    assert '"w4g" is no option' in lines[0] and "fp16 is not realized" in lines[1]
    assert "does not fit 6 sites" in lines[2] and '"no" matches no site' in lines[3]


def test_build_space_entry_of_wrong_options_is_told_once(sites):
    (line,) = refused(sites, Entry(("*.mlp.*",), ("w4g",)))
    assert '"w4g" is no option' in line


def test_build_space_skip_unfit_leaves_the_option_out_where_it_does_not_fit(sites):
    space = build_space(sites, [Entry(("*.mlp.*", "no.such"), ("w4g64", "w8"), skip_unfit=True)])
    assert space.texts[space.index("model.layers.0.mlp.gate_proj+up_proj")] == ("dense", "w8")
    assert space.texts[space.index("model.layers.0.mlp.down_proj")] == ("dense", "w4g64", "w8")


def test_parent_is_the_innermost_structure_site_of_the_space(sites):
    entries = [Entry(("block:*", "mlp:*"), ("drop",)), Entry(("*",), ("w8",))]
    space = build_space(sites, entries)
    above = {s.name: p for s, p in zip(space.sites, space.parent, strict=True)}
    place = space.names
    assert above["model.layers.1.mlp.down_proj"] == place["model.layers.1.mlp"]
    assert above["model.layers.1.mlp"] == place["model.layers.1"]
    # Attention has no choice here, so its weights belong to the block.
    assert above["model.layers.1.self_attn.o_proj"] == place["model.layers.1"]
    assert above["model.layers.1"] == -1


def test_canonical_makes_all_under_a_dropped_parent_neutral(space):
    chosen = {QKV.format(1): "w8", "model.layers.1.mlp": "drop", QKV.format(0): "w4g32"}
    canonical = space.canonical({**chosen, "model.layers.1": "drop"})
    expected = {"model.layers.1": "drop", QKV.format(0): "w4g32"}
    assert {k: v for k, v in canonical.items() if v not in ("dense", "keep")} == expected
    assert canonical.keys() == names(space)


def test_drop_for_a_constant_voids_what_a_drop_does(sites):
    entries = [Entry(("block:*",), ("drop:mean", "drop")), Entry(("mlp:*",), ("keep", "drop"))]
    space = build_space(sites, [*entries, Entry(("*",), ("w8",))])
    place = space.index("model.layers.1")
    assert space.texts[place] == ("keep", "drop", "drop:mean")
    assert space.voiding[place] == (False, True, True)
    below = {QKV.format(1): "w8", "model.layers.1.mlp": "drop"}
    chosen = {"model.layers.1": "drop:mean"}
    assert space.canonical(below | chosen) == space.canonical(chosen)
    assert [site.name for site in space.mean_sites] == [f"model.layers.{n}" for n in range(3)]
    assert "drop:mean" not in space.uniform_texts


def test_canonical_of_random_configurations_is_what_the_tree_says(space):
    generator = random.Random(0)
    for _ in range(100):
        config = tuple(generator.randrange(len(row)) for row in space.options)
        drawn = {s.name: space.texts[i][config[i]] for i, s in enumerate(space.sites)}
        gone = tuple(f"{name}." for name, text in drawn.items() if text[0] == "c" or text == "drop")
        canonical = space.configuration(config)
        for place, (name, text) in enumerate(drawn.items()):
            # A group's name starts with its holder's, as the name of every site in a module does.
            assert canonical[name] == (space.texts[place][0] if name.startswith(gone) else text)
        assert space.canonical(canonical) == canonical


@pytest.mark.parametrize(
    "configuration, told",
    [
        ({"model.layers.0.mpl": "drop"}, 'did you mean "model.layers.0.mlp"?'),
        ({QKV.format(0): "w5"}, f'site {QKV.format(0)} has no option "w5"; it has dense, w4g32'),
    ],
)
def test_config_of_unknown_names_says_what_there_is(space, configuration, told):
    with pytest.raises(InvalidInput) as error:
        space.config(configuration)
    assert told in str(error.value)


def test_uniform_takes_the_next_dearer_option_where_a_site_lacks_it(sites, make_model):
    entries = [
        Entry((QKV.format(0),), ("w3g32", "w8", "bf16")),
        Entry((QKV.format(1),), ("w2g32",)),
        Entry(("*",), ("w4g32", "bf16")),
        Entry(("*",), ("drop",)),
    ]
    space = build_space(sites, entries)
    chosen = space.configuration(space.uniform("w4g32", site_bytes(make_model("llama"), space)))
    assert chosen.pop(QKV.format(0)) == "w8" and chosen.pop(QKV.format(1)) == "dense"
    assert set(chosen.values()) == {"keep", "w4g32"}


def test_uniform_of_an_option_that_no_site_has(space, make_model):
    with pytest.raises(InvalidInput, match='no site of this space has the option "w2"'):
        space.uniform("w2", site_bytes(make_model("llama"), space))


def test_without_strikes_options_but_never_the_neutral_one(space):
    less = space.without({QKV.format(0): ["w8", "dense"], "model.layers.0": ["drop"]})
    assert less.texts[less.index(QKV.format(0))] == ("dense", "w4g32")
    assert less.texts[less.index("model.layers.0")] == ("keep",)
    assert less.texts[less.index(QKV.format(1))] == ("dense", "w4g32", "w8")


@pytest.mark.parametrize(
    "option, told",
    [
        ("w8a8", "where weights are written back, what enters the layer cannot be quantized"),
        ("w3:gptq", 'LSTM multiplies by it where nobody sees what with: option "w3:gptq": gptq'),
        ("s50%:wanda", "wanda needs calibration statistics and this layer has none"),
    ],
)
def test_build_space_refuses_what_needs_the_inputs_of_weights_that_nobody_sees(
    make_model, make_batch, option, told
):
    sites = discover(make_model("recurrent"), make_batch("recurrent")).sites
    (problem,) = refused(sites, Entry(("memory.weight_hh_l0",), (option, "w8")))
    assert f'"{option}" does not fit 1 site: ' in problem and told in problem
    space = build_space(sites, [Entry(("memory.weight_hh_l0",), (option, "w8"), skip_unfit=True)])
    assert space.texts == (("dense", "w8"),)


def test_build_space_takes_what_needs_the_inputs_of_experts_in_stacks(make_model, make_batch):
    sites = discover(make_model("mixtral"), make_batch("mixtral")).sites
    entry = Entry(("*.experts.*",), ("w3g16:gptq", "s50%:wanda", "w4g32:awq", "s50%:sparsegpt"))
    space = build_space(sites, [entry])
    assert space.texts == (("dense", *entry.options),) * 4
    (problem,) = refused(sites, Entry(("*.experts.*",), ("w8a8",)))
    assert "what enters the layer cannot be quantized" in problem


def test_build_space_parameters_of_a_sub_block_lie_in_it(make_model, make_batch):
    sites = discover(make_model("vision"), make_batch("vision")).sites
    space = build_space(sites, [replace(entry, skip_unfit=True) for entry in EVERYTHING])
    for name in ("blocks.1.attention.in_proj_weight", "blocks.1.attention.out_proj.weight"):
        assert space.sites[space.parent[space.index(name)]].name == "blocks.1.attention"
    space = build_space(sites, [Entry(("blocks.0.attention",), ("w8",))])
    assert names(space) == {
        "blocks.0.attention.in_proj_weight",
        "blocks.0.attention.out_proj.weight",
    }
