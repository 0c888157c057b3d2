"""Scales learned by gradient descent through `fake_quant` (as LSQ, arXiv 1902.08153), with optax."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fheq
from fheq.digits import load
from fheq.fitting.accumulators import fit_accumulators
from fheq.planning.plan import plan

SPEC = fheq.Spec(n_bits=2, observer=fheq.MinMax(), input_observer=fheq.MinMax())
Scales = dict[str, jax.Array]


def with_scales(qparams: fheq.QParams, logs: dict[str, Scales]) -> fheq.QParams:
    """An edit: the scales of tensors and weights from their logarithms, which keeps them positive."""
    put = lambda part: {k: replace(a, scale=jnp.exp(logs[part][k])) for k, a in getattr(qparams, part).items()}
    return replace(qparams, tensors=put("tensors"), weights=put("weights"))


def main(steps: int = 100) -> tuple[float, float]:
    """Mean squared errors to the float model on test images, of the exact integer program: fitted, then learned."""
    graph, data = load()
    stats = fheq.calibrate(graph, data["x_train"])
    fitted = fheq.fit(graph, stats, SPEC)
    x = jnp.asarray(data["x_train"])
    exact = fheq.evaluate(graph, x)

    def loss(logs: dict[str, Scales]) -> jax.Array:
        return jnp.mean((fheq.fake_quant(graph, with_scales(fitted, logs), x) - exact) ** 2)

    logs = {
        part: {k: jnp.log(jnp.float32(a.scale)) for k, a in getattr(fitted, part).items()} for part in ("tensors", "weights")
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    @jax.jit
    def step(state, _):
        logs, momentum = state
        value, slope = jax.value_and_grad(loss)(logs)
        updates, momentum = optimizer.update(slope, momentum)
        return (optax.apply_updates(logs, updates), momentum), value

    (logs, _), _ = jax.lax.scan(step, (logs, optimizer.init(logs)), None, length=steps)
    learned = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), with_scales(fitted, logs))
    learned = fit_accumulators(plan(graph), stats, SPEC, learned)  # their ranges follow the scales

    def error(qparams: fheq.QParams) -> float:
        program = fheq.lower(graph, qparams)
        (y,) = program.dequantize(fheq.simulate(program, *program.quantize(data["x_test"])))
        return float(np.mean((y - fheq.evaluate(graph, data["x_test"])) ** 2))

    before, after = error(fitted), error(learned)
    print(f"mean squared error of the integer program: fitted {before:.4g}, learned {after:.4g}")
    return before, after


if __name__ == "__main__":
    main()
