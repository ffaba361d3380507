"""Views: reading a member and writing it back are inverses, and touch nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apportion.kernels.formats import LayerShape
from apportion.spaces.sites import Member
from apportion.spaces.views import matrix_of, parameter_at, set_parameter, written

SIZES = st.integers(1, 6)


@given(SIZES, SIZES, st.booleans(), st.none() | st.integers(1, 4), st.data())
def test_written_matrix_is_read_again_and_the_rest_is_kept(out, inputs, transposed, stack, data):
    stored = (inputs, out) if transposed else (out, inputs)
    parameter = torch.randn(stored if stack is None else (stack, *stored))
    index = None if stack is None else data.draw(st.integers(0, stack - 1))
    member = Member("m", LayerShape(out, inputs), transposed, "p", index, written_back=True)
    before, matrix = parameter.clone(), torch.randn(out, inputs)
    values = written({"m.p": parameter}, [member], [matrix])["m.p"]
    assert torch.equal(matrix_of(values, member), matrix) and torch.equal(parameter, before)
    assert torch.equal(
        written({"m.p": values}, [member], [matrix_of(before, member)])["m.p"], before
    )


def test_written_convolution_keeps_its_shape():
    member = Member("m", LayerShape(3, 8), written_back=True)
    parameter, matrix = torch.randn(3, 2, 4), torch.randn(3, 8)
    values = written({"m.weight": parameter}, [member], [matrix])["m.weight"]
    assert values.shape == parameter.shape and torch.equal(matrix_of(values, member), matrix)


def test_set_parameter_of_a_recurrent_layer_is_what_it_runs_with():
    layer, x = nn.LSTM(4, 4), torch.randn(3, 1, 4)
    dense = parameter_at(layer, "weight_ih_l0")
    before = layer(x)[0]
    set_parameter(layer, "weight_ih_l0", torch.zeros(16, 4))
    assert torch.equal(layer(x)[0], layer(torch.zeros(3, 1, 4))[0])
    set_parameter(layer, "weight_ih_l0", dense)
    assert torch.equal(layer(x)[0], before) and layer.weight_ih_l0 is dense


def test_path_of_a_member_is_its_module_or_its_view():
    shape = LayerShape(2, 2)
    assert Member("a.b", shape).path == "a.b"
    assert Member("a.b", shape).parameter_path == "a.b.weight"
    assert Member("a.b", shape, parameter="c.d", index=3, written_back=True).path == "a.b.c.d.3"
    assert Member("", shape, parameter="own", written_back=True).path == "own"
