"""What blocks hand on comes back with the same bits and strides, from memory and from files."""

import errno

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.spaces.activations import Activations, leaves

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def tensor(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return (10 * torch.randn(shape, generator=generator)).to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=4),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
    st.randoms(use_true_random=False),
)
def test_files_give_back_bits_and_strides(folder, shape, dtype, seed, random):
    order = random.sample(range(len(shape)), len(shape))
    put = tensor(shape, dtype, seed).permute(order)
    activations = Activations(folder, memory_bytes=0)
    activations.put(0, put)
    taken = activations.take(0)
    assert (taken.dtype, taken.stride()) == (put.dtype, put.clone().stride())
    assert torch.equal(taken, put)
    assert list(folder.iterdir()) == []


def test_files_of_expanded_tensors(folder):
    activations = Activations(folder, memory_bytes=0)
    put = torch.arange(3.0).expand(4, 3)
    activations.put(0, put)
    assert torch.equal(activations.take(0), put)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 10])
def test_nests_come_back_as_they_were(folder, memory_bytes):
    activations = Activations(folder, memory_bytes)
    other = object()
    activations.put(3, (torch.ones(2, 2), None, [torch.zeros(1)], {"a": torch.ones(1)}, other))
    first, nothing, (second,), named, same = activations.take(3)
    assert torch.equal(first, torch.ones(2, 2)) and nothing is None and same is other
    assert torch.equal(second, torch.zeros(1)) and torch.equal(named["a"], torch.ones(1))


def test_memory_is_used_up_to_its_limit(folder):
    activations = Activations(folder, memory_bytes=100)
    for number in range(4):
        activations.put(number, torch.full((10,), float(number)))
    assert activations.held_bytes == 80
    assert torch.equal(activations.take(0), torch.zeros(10))
    activations.put(0, torch.ones(10))
    assert activations.held_bytes == 80
    taken = [activations.take(number)[0].item() for number in range(4)]
    assert taken == [1, 1, 2, 3] and activations.held_bytes == 0


def test_what_is_taken_from_a_file_may_be_written_to(folder):
    activations = Activations(folder, memory_bytes=0)
    activations.put(0, torch.ones(3))
    assert (activations.take(0).add_(1) == 2).all()


def test_full_disk_is_an_error(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("apportion.spaces.activations.NamedTemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        Activations(folder, memory_bytes=0).put(0, torch.ones(3))


def test_leaves_are_in_order():
    first, second, third = torch.zeros(1), torch.ones(1), torch.ones(2)
    found = leaves((first, [None, second], {"x": third}, "text"))
    assert [leaf is tensor for leaf, tensor in zip(found, (first, second, third), strict=True)]
