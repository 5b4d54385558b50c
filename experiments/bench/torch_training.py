"""How long PyTorch takes for a training step of a network: a process of its own; needs torch.

Command: python -m optjax.experiments.bench.torch_training NAME SIZES, with SIZES as JSON.
"""

import json
import sys
import time
from statistics import median

import numpy as np

from .torch_nets import NETS, has_gpu, trainer


def main() -> None:
    """Print the seconds of a step, the median of three stretches."""
    name, sizes = sys.argv[1], json.loads(sys.argv[2])
    if sizes["gpu"] and not has_gpu():
        sys.exit("torch sees no GPU and jax does: install the torch build for it")
    rng = np.random.default_rng(0)
    shape = (10 * sizes["batch_size"], sizes["side"], sizes["side"])
    train = trainer(
        NETS[name](sizes["filters"], sizes["colours"]),
        rng.uniform(size=(*shape, 1)).astype(np.float32),
        rng.integers(0, sizes["colours"], shape),
        batch_size=sizes["batch_size"],
        rate=sizes["rate"],
        gpu=sizes["gpu"],
        channels_last=True,
        compiled=sizes["compiled"],
    )
    train(max(10, sizes["steps"] // 10))  # compiles, and lets cuDNN choose
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        train(sizes["steps"])
        taken.append((time.perf_counter() - start) / sizes["steps"])
    print(json.dumps({"seconds": median(taken)}))


if __name__ == "__main__":
    main()
