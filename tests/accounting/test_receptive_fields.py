"""Receptive fields read off the program against the gradients of one output."""

from fractions import Fraction

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from optjax.accounting.intervals import IDENTITY, windowed
from optjax.accounting.receptive_fields import measured_field, receptive_fields
from optjax.colourisation.networks import ConvTransposeNet, PoolUpsampleNet, UNet
from optjax.convnets.layers import max_pool, upsample
from optjax.support.errors import UserError


def spans(mask):
    """(first, last) of the pixels seen along each axis."""
    found = [np.flatnonzero(mask.any(axis=1 - axis)) for axis in (0, 1)]
    return [(int(a.min()), int(a.max())) for a in found]


@pytest.mark.parametrize("net", [PoolUpsampleNet, ConvTransposeNet, UNet])
def test_the_nets_see_what_their_gradients_reach(net):
    small = net(filters=2, colours=2)
    field = receptive_fields(small, (32, 32, 1))[-1]
    for position in ((16, 16), (15, 18), (0, 31)):
        derived = [
            (max(first, 0), min(last, 31))
            for axis, o in zip(field.axes, position, strict=True)
            for first, last in [axis.at(o)]
        ]
        assert spans(measured_field(small, (32, 32, 1), position)) == derived


class Chain(nn.Module):
    """Layers by name: convolutions that pad to the same size, pools, upsamplings."""

    steps: tuple

    @nn.compact
    def __call__(self, x):
        for name, kernel, stride, dilation in self.steps:
            if name == "conv":
                x = nn.Conv(2, (kernel,) * 2, strides=stride, kernel_dilation=dilation)(x)
            elif name == "valid":
                x = nn.Conv(2, (kernel,) * 2, padding="VALID")(x)
            elif name == "up":
                x = nn.ConvTranspose(2, (kernel,) * 2, strides=(stride,) * 2)(x)
            elif name == "avg":
                x = nn.pool(x, 0.0, jax.lax.add, (kernel,) * 2, (stride,) * 2, "VALID")
            elif name == "pool":
                x = max_pool(x)
            else:
                x = upsample(x)
        return x


steps = st.tuples(
    st.sampled_from(["conv", "valid", "up", "avg", "pool", "nearest"]),
    st.integers(2, 4),
    st.integers(1, 2),
    st.integers(1, 2),
)


@settings(max_examples=5, deadline=None)
@given(st.lists(steps, min_size=1, max_size=4), st.data())
def test_random_chains_see_what_their_gradients_reach(chain, data):
    check_chain(chain, data)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(steps, min_size=1, max_size=4), st.data())
def test_many_chains_see_what_their_gradients_reach(chain, data):
    check_chain(chain, data)


def check_chain(chain, data):
    net = Chain(tuple(chain))
    try:
        field = receptive_fields(net, (16, 16, 1))[-1]
    except UserError as refused:
        assume("pooling does not divide" not in str(refused))  # an odd picture meets a pool
        raise
    picture = jax.ShapeDtypeStruct((1, 16, 16, 1), np.float32)
    output = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x)[0], picture)
    # Windows may leave nothing; one pixel of all, by pairs, is not known.
    assume(min(output.shape[1:3]) > 1)
    position = tuple(data.draw(st.integers(0, n - 1)) for n in field.output[:2])
    derived = [axis.at(o) for axis, o in zip(field.axes, position, strict=True)]
    mask = measured_field(net, (16, 16, 1), position, samples=128)
    assume(mask.any())
    for (first, last), seen in zip(derived, spans(mask), strict=True):
        # Where the border cuts a view, a dilated window may skip the pixels next to the border.
        assert seen[0] == first if first >= 0 else seen[0] >= 0
        assert seen[1] == last if last <= 15 else seen[1] <= 15
        assert first <= seen[0] <= seen[1] <= last


def test_fields_of_known_layers():
    fields = receptive_fields(PoolUpsampleNet, (32, 32, 1))
    rows = {f.name: (f.axes[0].size, f.axes[0].stride) for f in fields if f.kind != "elementwise"}
    assert rows["Conv_0"] == (3, 1)
    assert rows["max_pool_0"] == (4, 2)
    assert rows["Conv_1"] == (8, 2)
    assert rows["max_pool_1"] == (10, 4)
    assert rows["Conv_2"] == (18, 4)
    assert rows["upsample_1"][1] == 1
    assert fields[-1].axes[0].size == 26


def test_offsets_and_strides_of_one_window():
    assert windowed(IDENTITY, kernel=4, stride=2, padding=1).offset == Fraction(1, 2)
    assert windowed(IDENTITY, kernel=3, stride=1, padding=1, up=2).stride == Fraction(1, 2)
    with pytest.raises(UserError, match="sees no input"):
        windowed(IDENTITY, kernel=1, up=2)


def test_what_sees_everything_says_so():
    class Gated(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            return x * nn.sigmoid(nn.Dense(4)(x.mean((1, 2), keepdims=True)))

    fields = {f.name: f.axes for f in receptive_fields(Gated(), (8, 8, 1))}
    assert fields["Conv_0"][0].size == 3
    assert fields["Dense_0"] == (None, None)
    assert list(fields.values())[-1] == (None, None)
    assert measured_field(Gated(), (8, 8, 1), (0, 0)).all()


def test_sequences_and_volumes_have_fields_too():
    line = nn.Sequential([nn.Conv(3, (5,), strides=2), nn.relu, nn.Conv(3, (3,))])
    assert [f.axes[0].size for f in receptive_fields(line, (32, 1)) if f.kind == "conv"] == [5, 9]
    cube = nn.Conv(3, (3, 5, 1))
    assert [axis.size for axis in receptive_fields(cube, (8, 8, 8, 1))[0].axes] == [3, 5, 1]


def test_names_are_refused():
    with pytest.raises(UserError, match="needs numbers"):
        receptive_fields(UNet, ("H", 32, 1))
