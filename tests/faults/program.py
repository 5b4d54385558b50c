"""A program to be killed: a sweep of some kind, with its folder, that tells a digest of its result.

python program.py KIND FOLDER SECONDS: SECONDS after the first progress it kills itself; 0: never.
"""

import hashlib
import os
import signal
import sys
import threading
import time

import numpy as np
import optax

import optjax as oj

STOPS = {
    "target": oj.Target(0.25),
    "plateau": oj.Plateau(patience=3000),
    "halving": oj.Halving(1000),
}


def main(kind: str, out: str, seconds: float) -> None:
    begun = []

    def progress(text: str, fraction: float) -> None:
        if not begun:
            begun.append(time.monotonic())
            if seconds:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    found = swept(kind, out, progress)
    took = time.monotonic() - begun[0] if begun else 0.0  # or all was there
    print(took, digest(found))
    sys.stdout.flush()
    os._exit(0)  # do not wait for the timer


def swept(kind, out, progress):
    """Run the sweep; return its arrays by name."""
    how = {"out": out, "progress": progress, "checkpoint_seconds": 0, "chunk_steps": 100}
    rng = np.random.default_rng(0)
    problem = oj.least_squares(rng.normal(size=(40, 30)), rng.normal(size=40))
    run = oj.make_run(problem, optax.adam, 4000, max_batch_size=8, record_every=50)
    grid = {"learning_rate": [1e-4, 1e-3, 1e-2]}
    if kind == "colouriser":
        return colouriser(out, progress)
    if kind == "gradients":
        run = oj.make_run(problem, optax.sgd, 200, max_batch_size=8)
        slope = oj.hypergrad(run, wrt="learning_rate")
        del how["chunk_steps"]
        dataset = oj.sweep(slope, {"learning_rate": list(np.geomspace(1e-5, 1e-3, 40))}, 8, **how)
    elif kind == "masked":
        dataset = oj.sweep(run, {**grid, "batch_size": [1, 3, 8]}, 3, **how)
    elif kind in STOPS:
        # Chunks as long as time allows: where they end differs from process to process.
        how |= {"chunk_steps": None, "chunk_seconds": 0.02}
        run = oj.make_run(problem, optax.adam, 20_000, max_batch_size=8, record_every=50)
        rates = list(np.geomspace(1e-4, 0.1, 8))
        dataset = oj.sweep(run, {"learning_rate": rates}, 8, stop=STOPS[kind], **how)
    else:
        dataset = oj.sweep(run, grid, 4, **how)
    return {str(name): dataset[name].values for name in dataset.variables}


def colouriser(out, progress):
    from optjax.colourisation.pictures import demo_pictures
    from optjax.colourisation.training import train_colouriser

    pictures = demo_pictures(("coffee",), 16)
    model, scores = train_colouriser(
        pictures, net="conv-transpose", filters=4, bins=6, steps=400, batch_size=8, out=out,
        progress=progress,
    )  # fmt: skip
    leaves = {f"leaf{i}": leaf for i, leaf in enumerate(_leaves(model.variables))}
    return leaves | {name: np.array(value) for name, value in scores.items()}


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def digest(arrays):
    """Hash the arrays, to the bit."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
