"""What `apportion sites` says of a model whose experts lie in stacks."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from apportion.studies.cli.records import SiteRow
from apportion.studies.listing import site_rows
from apportion.studies.specification import StudySpec


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteRow]:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=96, **sizes, **heads))
    folder: Path = tmp_path_factory.mktemp("mixture")
    model.save_pretrained(folder)
    return {row["name"]: row for row in site_rows(f"hf:{folder}")}


def test_sites_say_which_are_written_back_and_what_that_means(rows: dict[str, SiteRow]) -> None:
    experts = rows["model.layers.1.mlp.experts.gate_up_proj"]
    assert (experts["layers"], experts["weights"]) == (4, 4 * 2 * 64 * 32)
    told = [name for name, row in rows.items() if row["note"].startswith("written back:")]
    assert told == [n for n in rows if ".experts." in n] and len(told) == 4
    assert experts["note"] == "written back: runs as dense does, no latency credit"


def test_sites_name_what_is_fixed_and_why(rows: dict[str, SiteRow]) -> None:
    fixed = {name: row["note"] for name, row in rows.items() if row["kind"] == "-"}
    assert fixed == {
        f"model.layers.{n}.mlp.gate": "fixed: a router among 4 experts" for n in (0, 1)
    }


def test_sites_say_what_of_attention_can_be_left_out(rows: dict[str, SiteRow]) -> None:
    told = rows["model.layers.0.self_attn"]["note"].split("; ")
    assert told[0].startswith("no cP%: nothing of what k_proj and q_proj and v_proj give can be")
    assert told[1:] == [
        "vP% keeps some of the 16 value dimensions of each head",
        "qP% keeps some of the 16 query-key dimensions of each head as rotary pairs",
    ]


def test_sites_say_which_norm_takes_scales_of_awq(rows: dict[str, SiteRow]) -> None:
    told = {name: row["note"] for name, row in rows.items() if "awq" in row["note"]}
    assert told == {
        f"model.layers.{n}.self_attn.q_proj+k_proj+v_proj": "scales of awq go into "
        f"model.layers.{n}.input_layernorm, which it alone reads"
        for n in (0, 1)
    }


CODE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.GRU(8, 8, batch_first=True))

def data(part):
    return [torch.full((2, 3, 8), float(len(part)))]
"""


def test_sites_say_why_nobody_sees_what_a_matrix_is_multiplied_with(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    source = f"python:{tmp_path / 'code.py'}"
    spec = StudySpec(
        study={"name": "recurrent"},
        model={"source": f"{source}:model"},
        data={"source": f"{source}:data"},
        space=[{"sites": ["*"], "options": ["w8"]}],
        limits={"bits": 9},
    )
    notes = {row["name"]: row["note"] for row in site_rows(spec)}
    told = "written back: runs as dense does, no latency credit"
    assert notes == {
        "0.weight_ih_l0": told,
        "0.weight_hh_l0": f"{told}, no input statistics: GRU multiplies by it where nobody sees "
        "what with",
    }


GEMMA = """
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=40, vocab_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4)
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads))

def data(part):
    draw = torch.Generator().manual_seed(len(part))
    return [{"input_ids": torch.randint(1, 96, (2, 12), generator=draw)}]
"""


def test_sites_say_which_caches_can_be_packed_and_why_not_where_not(tmp_path: Path) -> None:
    (tmp_path / "gemma.py").write_text(GEMMA)
    source = f"python:{tmp_path / 'gemma.py'}"
    spec = StudySpec(
        study={"name": "gemma"},
        model={"source": f"{source}:model"},
        data={"source": f"{source}:data"},
        space=[{"sites": ["cache:*"], "options": ["k8v8"]}],
        limits={"cache_bytes": "0.9x dense"},
    )
    rows = {row["name"]: row for row in site_rows(spec)}
    assert [name for name, row in rows.items() if row["kind"] == "cache"] == [
        "model.layers.1.self_attn.cache"
    ]
    found = rows["model.layers.1.self_attn.cache"]
    assert (found["parent"], found["options"]) == ("model.layers.1.self_attn", ["keep", "k8v8"])
    assert found["note"] == "of each token 2 heads: 8 channels of keys, 8 of values"
    assert rows["model.layers.0.self_attn"]["note"].endswith(
        "no kNvM: transformers keeps its tokens in a DynamicSlidingWindowLayer, not in a "
        "DynamicLayer"
    )
