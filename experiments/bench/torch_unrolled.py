"""Derivatives of a training run in PyTorch and its libraries, as one writes them; needs torch.

``python -m optjax.experiments.bench.torch_unrolled NAME FILE.npz STEPS`` takes one in a process of
its own and prints what it found and how far its memory grew, as JSON.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

CHUNK = 8  # steps in one compiled call: a call costs more than a step
COMPILED = {"cpp_wrapper": True}  # the call between the kernels in C++, not in Python

Found = tuple[float, list[float]]  # final loss; its derivatives by the rate and by the decay


class TorchWork(NamedTuple):
    """A run of w ← w − η g − λ w: everything drawn beforehand."""

    x: Any  # (n, d)
    y: Any  # (n,)
    weights: tuple[Any, ...]  # (d, h), (h,), (h, 1), (1,)
    picks: Any  # (T, B) int64
    rate: float
    decay: float

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], steps: int) -> "TorchWork":
        """From the arrays of a run of at least so many steps."""
        tensors = {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}
        weights = tuple(tensors[f"w{i}"] for i in range(4))
        picks = tensors["picks"][:steps].long()
        rate, decay = (float(v) for v in arrays["hyper"])
        return cls(tensors["x"], tensors["y"], weights, picks, rate, decay)


def derivatives(name: str, work: TorchWork) -> Found:
    """The final loss and its two derivatives, by the way of that name."""
    with _one_thread():
        return WAYS[name](work)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small take longer on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _loss(w, x, y):
    hidden = torch.relu(torch.addmm(w[1], x, w[0]))
    return F.mse_loss(torch.addmm(w[3], hidden, w[2])[:, 0], y)


def _leaves(work: TorchWork) -> tuple[Any, Any]:
    rate, decay = torch.tensor(work.rate), torch.tensor(work.decay)
    return rate.requires_grad_(), decay.requires_grad_()


def _read(loss: Any, leaves: tuple[Any, Any]) -> Found:
    return loss.item(), [g.item() for g in torch.autograd.grad(loss, leaves)]


# ------------------------------------------------------------------------------ unrolled graph


def unrolled(work: TorchWork) -> Found:
    """SGD by hand with create_graph=True, and backward through all of it."""
    rate, decay = _leaves(work)
    w = tuple(a.clone().requires_grad_() for a in work.weights)
    for p in work.picks:
        grads = torch.autograd.grad(_loss(w, work.x[p], work.y[p]), w, create_graph=True)
        w = tuple(a - rate * g - decay * a for a, g in zip(w, grads, strict=True))
    return _read(_loss(w, work.x, work.y), (rate, decay))


def _reverse_steps(w, rate, decay, picks, x, y):
    for p in picks.unbind():
        grads = torch.func.grad(_loss)(w, x[p], y[p])
        w = tuple(a - rate * g - decay * a for a, g in zip(w, grads, strict=True))
    return w


def unrolled_compiled(work: TorchWork) -> Found:
    """The same by `torch.func.grad`, compiled: autograd sees a node for each eight steps."""
    rate, decay = _leaves(work)
    steps = _compiled(_reverse_steps)
    w = tuple(a.clone().requires_grad_() for a in work.weights)
    for picks in work.picks.view(-1, CHUNK, work.picks.shape[1]):
        w = steps(w, rate, decay, picks, work.x, work.y)
    return _read(_loss(w, work.x, work.y), (rate, decay))


@functools.cache
def _compiled(steps: Callable) -> Callable:
    return torch.compile(steps, dynamic=False, options=COMPILED)


# -------------------------------------------------------------------------------- forward mode


def _squares(w, x, y):
    """`_loss` of elementary operations: the tangents of its `addmm` and `mse_loss` are refused.

    "ZeroTensors are immutable" outside of `torch.compile`; within it the program crashes.
    """
    return (((torch.relu(x @ w[0] + w[1]) @ w[2] + w[3])[:, 0]) - y).square().mean()


def _forward_steps(w, dw, rate, decay, picks, x, y):
    """Weights and two tangents each (2, ...), through the steps."""
    for p in picks.unbind():
        x_B, y_B = x[p], y[p]

        def gradient(w, x_B=x_B, y_B=y_B):
            return torch.func.grad(_squares)(w, x_B, y_B)

        def along(v, w=w, gradient=gradient):
            return torch.func.jvp(gradient, (w,), (v,))

        g, dg = torch.vmap(along, out_dims=(None, 0))(dw)
        dw = tuple(
            v - rate * u - decay * v - torch.stack([b, a])
            for a, b, v, u in zip(w, g, dw, dg, strict=True)
        )
        w = tuple(a - rate * b - decay * a for a, b in zip(w, g, strict=True))
    return w, dw


def _forward(work: TorchWork, steps: Callable, chunk: int) -> Found:
    with torch.no_grad():
        rate, decay = torch.tensor(work.rate), torch.tensor(work.decay)
        w = work.weights
        dw = tuple(torch.zeros(2, *a.shape) for a in w)
        for picks in work.picks.view(-1, chunk, work.picks.shape[1]):
            w, dw = steps(w, dw, rate, decay, picks, work.x, work.y)

        def along(v):
            return torch.func.jvp(lambda w: _squares(w, work.x, work.y), (w,), (v,))

        loss, slopes = torch.vmap(along, out_dims=(None, 0))(dw)
        return loss.item(), slopes.tolist()


def forward(work: TorchWork) -> Found:
    """`torch.func.jvp` of the gradient under `torch.vmap`."""
    return _forward(work, _forward_steps, 1)


def forward_compiled(work: TorchWork) -> Found:
    """The same, compiled."""
    return _forward(work, _compiled(_forward_steps), CHUNK)


# ----------------------------------------------------------------------------------- libraries


def _module(work: TorchWork) -> nn.Module:
    d, h = work.weights[0].shape
    net = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, 1))
    with torch.no_grad():
        for own, value in zip(net.parameters(), work.weights, strict=True):
            own.copy_(value.T if value.ndim == 2 else value)
    return net


def torchopt(work: TorchWork) -> Found:
    """`torchopt.MetaOptimizer` of `torchopt.sgd` with a tensor for its rate.

    `MetaSGD` refuses a tensor for the weight decay ("argument 'alpha' must be Number"): it is
    chained as a transformation of one's own.
    """
    import torchopt  # pyright: ignore[reportMissingImports]

    rate, decay = _leaves(work)

    def decayed(updates, state, *, params=None, inplace=True):
        return torchopt.pytree.tree_map(lambda u, a: u - decay * a, updates, params), state

    own = torchopt.base.GradientTransformation(lambda params: (), decayed)
    net = _module(work)
    optimizer = torchopt.MetaOptimizer(net, torchopt.chain(torchopt.sgd(rate), own))
    for p in work.picks:
        optimizer.step(F.mse_loss(net(work.x[p])[:, 0], work.y[p]))
    return _read(F.mse_loss(net(work.x)[:, 0], work.y), (rate, decay))


def higher(work: TorchWork) -> Found:
    """`higher.innerloop_ctx` of SGD, whose weight decay λ/η its rate multiplies to λ."""
    import higher  # pyright: ignore[reportMissingImports]

    rate, decay = _leaves(work)
    net = _module(work)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=1.0)
    override = {"lr": [rate], "weight_decay": [decay / rate]}
    with higher.innerloop_ctx(net, optimizer, override=override) as (inner, steps):
        for p in work.picks:
            steps.step(F.mse_loss(inner(work.x[p])[:, 0], work.y[p]))
        return _read(F.mse_loss(inner(work.x)[:, 0], work.y), (rate, decay))


WAYS: dict[str, Callable[[TorchWork], Found]] = {
    "PyTorch, unrolled graph": unrolled,
    "PyTorch, unrolled graph, torch.compile": unrolled_compiled,
    "PyTorch, forward mode": forward,
    "PyTorch, forward mode, torch.compile": forward_compiled,
    "torchopt": torchopt,
    "higher": higher,
}


# --------------------------------------------------------------------------- a process of its own


def _resident(which: str) -> float:
    """MiB: "VmRSS" now, "VmHWM" at most so far."""
    # Not getrusage: its maximum starts at the parent's size when a process is forked from it.
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {which}")


def main(name: str, file: str, steps: str) -> None:
    """Take the derivatives; print them and the growth of the resident memory meanwhile."""
    with np.load(file) as arrays:
        work = TorchWork.of(dict(arrays), int(steps))
    derivatives(name, work._replace(picks=work.picks[: 2 * CHUNK]))
    peak = Path("/proc/self/clear_refs")
    before = None
    if peak.exists():
        peak.write_text("5", encoding="utf-8")  # the maximum starts again from here
        before = _resident("VmRSS")
    loss, slopes = derivatives(name, work)
    growth = None if before is None else _resident("VmHWM") - before
    print(json.dumps({"loss": loss, "slopes": slopes, "mib": growth}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # torch.compile ends its messages with advice
        sys.exit(f"{type(error).__name__}, {(str(error).splitlines() or ['no message'])[0]}")
