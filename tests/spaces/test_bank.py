"""The bank: what is put comes back to the bit, and numbers never change under an old name."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from apportion.errors import ApportionError
from apportion.hashing import content_hash, tensors_hash
from apportion.kernels.formats import ConvGeometry, LayerShape
from apportion.kernels.reference import reference_weight
from apportion.spaces.bank import COMPRESSOR_VERSION, Bank, entry_key
from apportion.spaces.compressors.compose import InputStatistics, realize
from apportion.spaces.grammar import parse_option
from apportion.spaces.stored import StoredSite

OPTIONS = """f32 bf16 w2 w3 w4 w8 w2g16 w3g32 w4g32 w4g32s w8g16 w8a8 s50% s62.5%:magnitude r50%
r50%:svd w4g32+r4 w2+r8:svd s50%+r4 s50%+w4g32 s60%+w3 s50%+w4g16+r4 w3g16:awq
s50%+w4g16:awq+o1%+r4 w8a8s""".split()
# The weights have few bits, so that sums of them hardly round: the hash is the same with and
# without vector instructions. Singular values are the library's, and are compared by their error.
GOLDEN_OPTIONS = "bf16 w2 w3g16 w4g32s w4 w8 w8g16 w8a8 s50% s50%:magnitude s60%+w4g16".split()
GOLDEN_VERSION, GOLDEN = 3, "3add6745272d995cc7ba65ec32b58e24"
GOLDEN_ERRORS = {"r50%": 923.817, "r50%:svd": 939.508, "w4g32+r4": 3.32453, "s50%+r4:svd": 121.616}
DIAGONAL = torch.arange(1, 33, dtype=torch.float64)


def weight(out=24, inputs=32):
    """Small multiples of 1/64, every row another one."""
    numbers = torch.arange(out * inputs).reshape(out, inputs)
    return ((numbers * 37 + numbers // inputs * 11) % 127 - 63).float() / 64


def statistics(inputs=32):
    moment = torch.diag(torch.arange(1, inputs + 1, dtype=torch.float64))
    return InputStatistics(moment, inputs, torch.arange(1, inputs + 1, dtype=torch.float32))


def stored(text, shape=None):
    shape = shape or LayerShape(24, 32)
    return realize(weight(), shape, parse_option(text), statistics(), "float32", 4)


@pytest.fixture
def bank(tmp_path):
    return Bank(tmp_path / "bank")


def assert_same(read, put):
    assert [(m.format, m.shape) for m in read] == [(m.format, m.shape) for m in put]
    for one, other in zip(read, put, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert tensors_hash(one.tensors) == tensors_hash(other.tensors)


@pytest.mark.parametrize("text", OPTIONS)
def test_get_returns_what_was_put_to_the_bit(bank, text):
    bank.put("a1", StoredSite((stored(text),)))
    assert_same(bank.get("a1").weights, [stored(text)])


def test_get_keeps_members_apart_and_in_order(bank):
    geometry = ConvGeometry((4, 2), (2, 1), (1, 1), (1, 1))
    convolution = stored("w4g16", LayerShape(24, 32, geometry))
    # More than ten: members are no prefixes of each other.
    members = [stored(text) for text in OPTIONS[:11]] + [convolution]
    bank.put("a1", StoredSite(tuple(members)))
    assert_same(bank.get("a1").weights, members)


def test_has_and_bytes_tell_what_is_there(bank):
    assert not bank.has("a1") and bank.bytes("a1") == 0
    bank.put("a1", StoredSite((stored("w8"),)))
    assert bank.has("a1") and bank.bytes("a1") > 24 * 32
    assert not bank.has("a2")


def test_get_of_a_missing_entry_names_it(bank):
    with pytest.raises(ApportionError, match=r"bank entry .*a1\.safetensors cannot be read"):
        bank.get("a1")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def strip_header(path):
    save_file(load_file(path), path)


def lose_tensor(path):
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors.pop("0.zero")
    save_file(tensors, path, metadata=header)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, strip_header, lose_tensor, flip_bit])
def test_get_of_a_damaged_entry_names_it(bank, damage):
    bank.put("a1", StoredSite((stored("w4g32"),)))
    (path,) = bank.folder.rglob("*.safetensors")
    damage(path)
    with pytest.raises(ApportionError, match=r"bank entry .*a1\.safetensors cannot be read"):
        bank.get("a1")


def test_put_of_one_key_at_the_same_time_leaves_one_whole_entry(bank):
    member = stored("s50%+w4g32")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: bank.put("a1", StoredSite((member,))), range(40)))
    assert_same(bank.get("a1").weights, [member])
    assert [p.name for p in bank.folder.rglob("*") if p.is_file()] == ["a1.safetensors"]


def test_put_that_fails_leaves_nothing(bank, monkeypatch):
    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        bank.put("a1", StoredSite((stored("w8"),)))
    assert not bank.has("a1") and not [p for p in bank.folder.rglob("*") if p.is_file()]


def test_entry_key_changes_with_all_that_an_entry_is_made_from():
    made_from = ["weights", parse_option("w4g32"), "statistics", "float32", 8]
    others = ["other", parse_option("w4g32s"), None, "bfloat16", 16]
    changed = [[*made_from[:k], other, *made_from[k + 1 :]] for k, other in enumerate(others)]
    keys = {entry_key(*each) for each in [made_from, *changed]}
    assert len(keys) == 6 and entry_key(*made_from) in keys


def test_compressors_give_the_numbers_of_their_version():
    """When this fails: raise COMPRESSOR_VERSION in spaces/bank.py and take the new hash here."""
    hashes = {text: tensors_hash(stored(text).tensors) for text in GOLDEN_OPTIONS}
    assert (COMPRESSOR_VERSION, content_hash(hashes)) == (GOLDEN_VERSION, GOLDEN)


@pytest.mark.parametrize("text", GOLDEN_ERRORS)
def test_compressors_give_the_ranks_of_their_version(text):
    error = (reference_weight(stored(text)) - weight()).double().square() @ DIAGONAL
    assert error.sum().item() == pytest.approx(GOLDEN_ERRORS[text], rel=1e-3)
