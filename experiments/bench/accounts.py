"""How long it takes to count what a deep network holds and does."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from optjax.accounting.account import account
from optjax.support.types import Array

from .measure import Entry, Side, seconds


class Deep(nn.Module):
    """Convolutions and activations, one after the other."""

    layers: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(self.layers):
            x = nn.relu(nn.Conv(16, (3, 3))(x))
        return x


def entries(layers: int) -> list[Entry]:
    """`account` in numbers and in symbols beside Flax's `tabulate`, which compiles to count."""

    def prepare(_: Entry) -> list[Side]:
        net, x = Deep(layers), jnp.zeros((1, 32, 32, 16))

        def tabulate() -> None:
            net.tabulate(jax.random.key(0), x, compute_flops=True)

        calls = {
            "account": lambda: account(net, (32, 32, 16)),
            "account, in symbols": lambda: account(net, ("H", "W", 16)),
            "account, with a training step": lambda: (
                account(net, (32, 32, 16), batch=100).training_flops
            ),
            "flax tabulate with FLOPs": tabulate,
        }
        account(Deep(1), ("H", "W", 16))  # imports
        return [Side(name, lambda call=call: seconds(call)) for name, call in calls.items()]

    what = f"counting a network of {layers} convolutions and as many activations"
    return [Entry("accounting", what, "s", "account", prepare)]
