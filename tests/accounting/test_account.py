"""Accounts of networks against Jacobians, closed forms and the source's own polynomials."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from optjax.accounting.account import account
from optjax.accounting.counts import count
from optjax.colourisation.networks import ConvTransposeNet, PoolUpsampleNet, UNet
from optjax.support.errors import UserError

NIC, NF, NC = (sympy.Symbol(n, integer=True, positive=True) for n in ("NIC", "NF", "NC"))


# --------------------------------------------------------------------- the source's polynomials


@pytest.fixture(scope="module")
def pool_net():
    return account(PoolUpsampleNet, ("H", "W", "NIC"), filters="NF", colours="NC")


@pytest.mark.parametrize(
    ("size", "column", "expected"),
    [
        (32, "weights", 9 * NIC * NF + 36 * NF**2 + 9 * NF * NC + 9 * NC**2),
        (64, "weights", 9 * NIC * NF + 36 * NF**2 + 9 * NF * NC + 9 * NC**2),
        (32, "outputs", 2240 * NF + 2304 * NC),
        (64, "outputs", 8960 * NF + 9216 * NC),
        (
            32,
            "connections",
            9216 * NIC * NF + 5760 * NF**2 + 1792 * NF + 2304 * NF * NC + 1024 * NC + 9216 * NC**2,
        ),
        (
            64,
            "connections",
            36864 * NIC * NF
            + 23040 * NF**2
            + 7168 * NF
            + 9216 * NF * NC
            + 4096 * NC
            + 36864 * NC**2,
        ),
    ],
)
def test_the_sources_polynomials(pool_net, size, column, expected):
    assert sympy.expand(pool_net.at(H=size, W=size).total(column) - expected) == 0
    traced_there = account(PoolUpsampleNet, (size, size, "NIC"), filters="NF", colours="NC")
    assert sympy.expand(traced_there.total(column) - expected) == 0


@pytest.mark.parametrize(
    ("net", "multiply_adds", "parameters"),
    [
        pytest.param(PoolUpsampleNet, 13_271_040, 49_728, marks=pytest.mark.slow),
        pytest.param(ConvTransposeNet, 9_510_912, 49_728, marks=pytest.mark.slow),
        (UNet, 11_501_568, 56_856),
    ],
)
def test_the_three_nets_at_their_defaults(net, multiply_adds, parameters):
    found = account(net, (32, 32, 1))
    assert (found.multiply_adds, found.parameters) == (multiply_adds, parameters)
    real = net().init(jax.random.key(0), jnp.zeros((1, 32, 32, 1), jnp.float32))["params"]
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(real))
    symbolic = account(net, ("H", "W", "NIC"), filters="NF", colours="NC")
    put = symbolic.at(H=32, W=32, NIC=1, NF=32, NC=24)
    for column in ("weights", "outputs", "connections", "connections_exact", "flops"):
        assert put.total(column) == found.total(column)
    assert put.training_flops == found.training_flops
    assert symbolic.function("connections")(H=32, W=32, NIC=1, NF=32, NC=24) == found.connections


@pytest.mark.parametrize(
    ("net", "first_layer", "multiply_adds"),
    [(PoolUpsampleNet, 294_912, 13_271_040), (ConvTransposeNet, 73_728, 9_510_912)],
)
def test_a_training_step_multiplies_three_times_but_for_the_gradient_by_the_picture(
    net, first_layer, multiply_adds
):
    program = account(net, (32, 32, 1), batch=3)._training
    products = sum(
        op.times * count(op, program.shapes, gradient=True).multiply_adds for op in program.ops
    )
    assert products == 3 * (3 * multiply_adds - first_layer)


# ------------------------------------------------------------------------- random small networks


NO_EDGES = ((0, 0), (0, 0))


@st.composite
def layers(draw):
    """(groups, layer, the same without borders, the padding that its input then has).

    A convolution without borders takes an input padded beforehand; a transposed one crops nothing.
    """
    kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    dilation, groups = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2]))
    extent = dilation * (kernel - 1)
    shared = {
        "features": groups * draw(st.integers(1, 2)),
        "use_bias": False,
        "kernel_size": (kernel, kernel),
        "strides": (stride, stride),
        "kernel_dilation": (dilation, dilation),
    }
    if draw(st.booleans()):
        shared |= {"feature_group_count": groups}
        edges = draw(st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2))
        return groups, nn.Conv(padding=edges, **shared), nn.Conv(padding="VALID", **shared), edges
    cut = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    edges = tuple((max(extent - c, 0),) * 2 for c in cut)
    layer = nn.ConvTranspose(padding=edges, **shared)
    if stride == 1:  # a convolution, in the program and in the account
        return 1, layer, nn.Conv(padding="VALID", **shared), edges
    whole = nn.ConvTranspose(padding=[(extent, extent)] * 2, **shared)
    return 1, layer, whole, NO_EDGES


def connected(layer, x, edges=NO_EDGES):
    """Non-zeros of a linear layer's Jacobian: its results for every picture with one bright pixel.

    All weights are 1, so that nothing cancels.
    """
    x = jnp.pad(x, ((0, 0), *edges, (0, 0)))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), params)
    pixels = jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape[1:])
    return int(np.count_nonzero(layer.apply(params, pixels)))


def check_network(chain, size, channels):
    x = jnp.ones((1, *size, channels), jnp.float32)
    expected, convention, shapes = [], [], [x.shape[1:]]
    for groups, layer, padded, edges in chain:
        assume(x.shape[-1] % groups == 0)
        shape = jax.eval_shape(
            lambda x, layer=layer: layer.init_with_output(jax.random.key(0), x)[0], x
        )
        assume(min(shape.shape) > 0 and shape.size <= 400)
        expected.append(connected(layer, x))
        convention.append(connected(padded, x, edges))
        shapes.append(shape.shape[1:])
        x = jnp.ones(shape.shape, jnp.float32)
    found = account(nn.Sequential([layer for _, layer, _, _ in chain]), (*size, channels))
    assert [row.connections_exact for row in found.rows] == expected
    assert [row.connections for row in found.rows] == convention
    assert [row.output for row in found.rows] == shapes[1:]
    assert found.outputs == sum(int(np.prod(shape)) for shape in shapes[1:])
    assert found.multiply_adds == found.connections == sum(convention)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(layers(), min_size=1, max_size=2),
    st.tuples(st.integers(3, 7), st.integers(3, 7)),
    st.sampled_from([1, 2]),
)
def test_connections_are_the_nonzeros_of_the_layers_jacobians(chain, size, channels):
    check_network(chain, size, channels)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(layers(), min_size=1, max_size=3),
    st.tuples(st.integers(3, 8), st.integers(3, 8)),
    st.sampled_from([1, 2, 4]),
)
def test_connections_of_many_networks(chain, size, channels):
    check_network(chain, size, channels)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(layers(), min_size=1, max_size=3),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from([2, 4]),
)
def test_numbers_and_symbols_agree_at_random_sizes(chain, turns, channels):
    inputs = channels
    for groups, layer, _, _ in chain:
        assume(inputs % groups == 0)
        inputs = layer.features
    net = nn.Sequential([layer for _, layer, _, _ in chain])
    symbolic = account(net, ("H", "W", channels))
    put = {}
    for name, turn in zip("HW", turns, strict=True):
        x = sympy.Symbol(name, integer=True, positive=True)
        step, least = symbolic.multiples.get(x, 1), symbolic.least.get(x, 1)
        put[name] = step * (turn + -(-least // step))
    there, numbers = symbolic.at(**put), account(net, (*put.values(), channels))
    for column in ("weights", "outputs", "connections", "connections_exact", "flops"):
        assert there.total(column) == numbers.total(column), column
    assert [row.output for row in there.rows] == [row.output for row in numbers.rows]


def test_a_polynomial_says_from_where_on_it_holds():
    class Lenet(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.max_pool(nn.Conv(8, (3, 3), padding="VALID")(x), (2, 2), (2, 2))
            return nn.Dense(10)(x.reshape(x.shape[0], -1))

    symbolic = account(Lenet(), ("H", "W", 1))
    assert {str(s): m for s, m in symbolic.multiples.items()} == {"H": 4, "W": 4}
    for size in (12, 28):
        assert (
            symbolic.at(H=size, W=size).multiply_adds
            == account(Lenet(), (size, size, 1)).multiply_adds
        )
    with pytest.raises(UserError, match="H is 8: the formulas hold from 12 on"):
        symbolic.at(H=8)
    with pytest.raises(UserError, match="H is 30: expected a positive multiple of 4"):
        symbolic.at(H=30)


# ------------------------------------------------------------------------- other kinds of layers


class Tower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_nnx_modules_count_too():
    found = account(Tower, (8, 8, 3))
    assert found.weights == 9 * 3 * 4 + 4 * 2
    assert found.biases == 4 + 2 * 4 + 2
    rows = {row.name: row for row in found.rows}
    assert rows["conv"].multiply_adds == 64 * 9 * 3 * 4
    assert (rows["pool"].outputs, rows["pool"].connections) == (4, 64 * 4)


def test_patches_by_a_one_hot_convolution_are_no_products():
    class Patches(nn.Module):
        @nn.compact
        def __call__(self, x):
            patches = jax.lax.conv_general_dilated_patches(
                x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return nn.Dense(5, use_bias=False)(patches)

    found, conv = (
        account(net, (8, 8, 2)) for net in (Patches(), nn.Conv(5, (3, 3), use_bias=False))
    )
    assert found.multiply_adds == conv.multiply_adds == 64 * 9 * 2 * 5
    assert found.weights == conv.weights


def test_a_recurrent_cell_counts_once_a_turn():
    class Reader(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.LSTMCell(8))(x)[:, -1])

    found = account(Reader(), (12, 5))
    assert found.multiply_adds == 12 * 4 * (5 * 8 + 8 * 8) + 8 * 3
    assert found.weights == 4 * (5 * 8 + 8 * 8) + 8 * 3
    assert found.biases == 4 * 8 + 3


def test_attention_in_the_length_of_its_input():
    found = account(nn.MultiHeadDotProductAttention(num_heads=2), ("L", 16))
    L = sympy.Symbol("L", integer=True, positive=True)
    # Four projections, and two products of every position with every other.
    assert sympy.expand(found.multiply_adds - (4 * L * 16 * 16 + 2 * L**2 * 16)) == 0
    assert not [row for row in found.rows if row.kind == "pool"]  # a softmax is none


def test_a_transformer_block_in_the_textbooks_formula():
    class Block(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            return x + nn.Dense(self.width)(y)

    found = account(Block, ("L", "D"), width="D")
    L, D = (sympy.Symbol(n, integer=True, positive=True) for n in "LD")
    assert sympy.expand(found.weights - 12 * D**2) == 0
    assert sympy.expand(found.multiply_adds - (12 * L * D**2 + 2 * L**2 * D)) == 0
    there = found.at(L=6, D=8)
    assert there.parameters == account(Block(8), (6, 8)).parameters
    assert there.training_flops == account(Block(8), (6, 8)).training_flops


def test_normalisations_are_no_pools_and_resizing_is_upsampling():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.GroupNorm(2)(nn.LayerNorm()(x))
            x = jax.image.resize(x, (x.shape[0], 16, 16, 4), "nearest")
            x = nn.max_pool(x, (2, 2), (2, 2))
            return x * nn.sigmoid(nn.Dense(4)(x.mean((1, 2))))[:, None, None]

    found = account(Mixed(), (8, 8, 4))
    assert [(row.kind, row.outputs, row.connections) for row in found.rows if row.outputs] == [
        ("upsample", 16 * 16 * 4, 16 * 16 * 4),
        ("pool", 8 * 8 * 4, 16 * 16 * 4),
        ("pool", 4, 8 * 8 * 4),
        ("dense", 4, 16),
    ]
    assert found.biases == 2 * 4 + 2 * 4 + 4


def test_tied_weights_count_once_and_their_products_each_time():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(6, use_bias=False)
            return layer(layer(x))

    found = account(Tied(), (6,))
    assert (found.weights, found.multiply_adds) == (36, 72)

    class Words(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = nn.Embed(50, 8)
            return table.attend(table(x))

    words = account(Words(), (10,), dtype=jnp.int32)
    assert (words.weights, words.multiply_adds) == (400, 10 * 8 * 50)


def test_what_is_not_counted_is_named():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param("idle", nn.initializers.ones, (3,))
            x = jax.lax.while_loop(lambda v: jnp.sum(v) < 3.0, lambda v: v + 1.0, x)
            return jnp.fft.fft(x).real

    named = " ".join(account(Odd(), (8,)).uncounted)
    assert "fft" in named
    assert "while_loop" in named
    assert "parameter idle (not read)" in named


def test_products_of_parameters_alone_are_named():
    class LowRank(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            a = self.param("a", init, (16, 2), jnp.float32)
            b = self.param("b", init, (2, 16), jnp.float32)
            return x @ (a @ b)

    found = account(LowRank(), (16,))
    assert (found.weights, found.multiply_adds) == (64, 256)
    assert found.uncounted == ("dot_general of parameters alone",)


def test_nothing_is_allocated():
    # 8 TB of weights
    found = account(nn.Dense(1_000_000), (2_000_000,))
    assert found.parameters == 2 * 10**12 + 10**6


def test_dense_layers_in_closed_form():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(128)(x)))

    found = account(MLP(), (64,), batch=32)
    assert found.flops == 2 * (64 * 128 + 128) + (128 + 1) + 128  # products, biases, relu
    assert found.activation_bytes == 4 * (128 + 128 + 1)
    arrays = 4 * (found.parameters * 4 + 32 * 64)  # parameters, gradients, moments, the input
    assert arrays < found.training_bytes < arrays + 4 * 32 * 128 * 6


def test_what_a_training_step_is_predicted_to_hold_is_what_xla_holds():
    net, batch = UNet(filters=8, colours=6), 32
    found = account(net, (16, 16, 1), batch=batch)
    x = jax.ShapeDtypeStruct((batch, 16, 16, 1), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def step(variables, x):
        def loss(params):
            out, new = net.apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.square(out)), new

        return jax.grad(loss, has_aux=True)(variables["params"])

    held = jax.jit(step).lower(variables, x).compile().memory_analysis()
    real = held.temp_size_in_bytes + held.argument_size_in_bytes + held.output_size_in_bytes
    ours = found.training_bytes - 2 * 4 * found.parameters  # without Adam's moments
    # XLA fuses, which takes less, and copies for its matrix products, which takes more: the
    # smaller the picture the more so (0.88 to 1.01 at 32 x 32 with 32 filters).
    assert 0.6 < ours / real < 1.6


def test_a_module_of_several_operations_and_no_others():
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.max_pool(nn.relu(nn.max_pool(x, (2, 2), (2, 2))), (2, 2), (2, 2))

    rows = account(Bare(), (8, 8, 1)).rows
    assert [(row.kind, row.connections) for row in rows if row.outputs] == [
        ("pool", 64),
        ("pool", 16),
    ]


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 128), (129, 1), (2, 512)])
def test_windows_wider_than_pictures_count_right_in_symbols(kernel, dilation):
    net = nn.Conv(1, (kernel,), kernel_dilation=dilation)
    symbolic = account(net, ("T", 1))
    for length in (1000, 2000):
        numbers = account(net, (length, 1)).connections_exact
        assert symbolic.at(T=length).connections_exact == numbers


def test_a_long_stride_finds_its_own_multiple():
    net = nn.Conv(8, (400,), strides=(160,), padding="VALID")
    symbolic = account(net, ("T", 1))
    assert list(symbolic.multiples.values()) == [160]
    for length in (480, 1600):
        assert symbolic.at(T=length).connections == account(net, (length, 1)).connections


def test_a_training_step_of_outputs_without_a_batch_axis():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(3)(x)
            return y, jnp.mean(jnp.square(y))

    assert account(Two(), (4,), batch=5).training_flops > 2 * 5 * 2 * 12


def test_moments_take_the_bytes_of_their_own_parameters():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param("idle", nn.initializers.zeros, (1000,), jnp.float32)
            return nn.Dense(1, param_dtype=jnp.bfloat16, dtype=jnp.float32)(x)

    bare, more = account(nn.Dense(1), (4,)), account(Mixed(), (4,))
    # The idle parameter, its gradient and two moments; the layer's own are half as wide.
    assert more.training_bytes - bare.training_bytes == pytest.approx(4 * 4 * 1000, abs=100)


def test_an_account_is_plain_data():
    found = account(UNet(filters=2, colours=3), (8, 8, 1))
    assert json.dumps([row._asdict() for row in found.rows])
    assert hash(found.rows) == hash(account(UNet(filters=2, colours=3), (8, 8, 1)).rows)


# --------------------------------------------------------------------------------- bad input


class Needs(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: account(UNet, (33, 32, 1)), "layer Conv_0: stride 2 does not divide size 33"),
        (lambda: account(UNet, (32, 34, 1)), "layer Conv_1: stride 2 does not divide size 17"),
        (lambda: account(PoolUpsampleNet, (30, 32, 1)), "does not divide a picture of 15 x 16"),
        (lambda: account(UNet, (32, "3", 1)), "symbol '3': expected a name"),
        (lambda: account(UNet, (32, -1, 1)), "a length is -1"),
        (lambda: account(UNet, [32, 32, 1]), "expected a tuple"),
        (lambda: account(UNet, (32, 32, 1), filters="3F"), "symbol '3F': expected a name"),
        (lambda: account(UNet, (32, 32, 1), width=3), "UNet takes no 'width'"),
        (lambda: account(Needs, (32,)), "Needs wants arguments: features"),
        (lambda: account(object, (32,)), "object is no Flax module"),
        (lambda: account(UNet(), (32, 32, 1), filters=3), "widths are given"),
        (lambda: account(nn.Dense(3), ()), "expected a tuple"),
        (lambda: account(nn.Conv(3, (3, 3)), (8,)), "layer Conv"),
        (lambda: account(UNet, (32, 32, "NIC")).at(NF=3), "no symbol 'NF': expected NIC"),
        (lambda: account(UNet, (32, 32, "NIC")).at(NIC="two"), "NIC is 'two'"),
        (lambda: account(UNet, (32, 32, "NIC")).training_bytes, "memory needs numbers"),
        (lambda: account(UNet, (32, 32, "NIC")).total("flop"), "no count 'flop'"),
        (lambda: account(UNet, (32, 32, "NIC")).function("flops")(NF=1), "expected NIC"),
    ],
)
def test_refusals_are_one_clear_line(call, says):
    with pytest.raises(UserError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value)
