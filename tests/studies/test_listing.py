"""What `apportion sites` says of a model whose experts lie in stacks."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from apportion.studies.cli.records import SiteRow
from apportion.studies.listing import site_rows


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
    assert "no latency credit, no input statistics" in experts["note"]


def test_sites_name_what_is_fixed_and_why(rows: dict[str, SiteRow]) -> None:
    fixed = {name: row["note"] for name, row in rows.items() if row["kind"] == "-"}
    assert fixed == {
        f"model.layers.{n}.mlp.gate": "fixed: a router among 4 experts" for n in (0, 1)
    }
