"""Reconstruction: weights, biases and activations' steps tuned so that the quantized model gives what the float one gives.

The quantized model runs with everything that a circuit does to its values: quantized activations, accumulators rounded to
the bits that tables read, noise at the tables' inputs. Gradients pass straight through roundings (arXiv 1308.3432), steps of
activations are learned as in LSQ (arXiv 1902.08153), and rounding is left out at random elements as in QDrop (arXiv
2203.05740). Layers are tuned for the outputs, or in blocks as in BRECQ (arXiv 2102.05426). Targets are the float model's
outputs and intermediate results on the calibration inputs: no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fheq.affine import straight_through
from fheq.arguments import check_chances, check_key, check_whole, is_number
from fheq.arrays.compiled import compiled_for
from fheq.batching import check_arrays
from fheq.client.outputs import split
from fheq.display.progress import track
from fheq.encryption.table_noise import draws, missed, noise_at_tables, tabulated
from fheq.errors import QuantizationError
from fheq.evaluate import evaluate_sample
from fheq.fake_quant import output_values, prepare, tensor_values
from fheq.graph import Graph
from fheq.integers.integer_weights import along_inputs, reading
from fheq.interpret import interpret
from fheq.planning.plan import Plan
from fheq.planning.quantizers import plan_for
from fheq.qparams import QParams
from fheq.steps import Linear, Step
from fheq.tuning.learned import Learned, applied, initial, with_learned

if TYPE_CHECKING:
    from optax import GradientTransformation

Array = Any
BLOCK = 100  # optimizer steps per call
EDGE = 0.05  # of an accumulator's range, at both ends, at least: values in there are pushed back
PUSH = 10.0  # weight of that: a value that wraps around spoils more than what most values gain


@dataclass(frozen=True)
class Training:
    """How a reconstruction optimizes.

    Args:
        steps: optimizer steps (Adam, cosine decay).
        batch_size: samples per step.
        learning_rate: in units of each weight's root mean square.
        hints: weight of the intermediate results' errors beside the outputs'.
        drop: share of accumulators that are not rounded in a step.
        adaptive: whether to learn nothing but which of its two neighbours on the grid each weight is rounded to, as AdaRound
            does (arXiv 2004.10568), and biases. Fewer freedoms fit less to the data given: for many bits and few data.
        block: linear layers of a block; each block is tuned for its own results alone, given what the quantized blocks
            before it make (arXiv 2102.05426). 0 tunes all for the outputs.

    Raises:
        QuantizationError: an option is outside of its range.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    hints: float = 1.0
    drop: float = 0.0
    adaptive: bool = False
    block: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("block", 0)):
            check_whole(f"training.{name}", getattr(self, name), least)
        if not is_number(self.learning_rate) or self.learning_rate <= 0:
            raise QuantizationError(f"training.learning_rate must be a number above 0, got {self.learning_rate!r}")
        if not is_number(self.hints) or self.hints < 0:
            raise QuantizationError(f"training.hints must be a number not below 0, got {self.hints!r}")
        if not is_number(self.drop) or not 0 <= self.drop < 1:
            raise QuantizationError(f"training.drop must be a share of at least 0 and below 1, got {self.drop!r}")


def reconstruct(
    graph: Graph,
    qparams: QParams,
    *inputs: Array,
    key: Array,
    p_error: float = 0.1,
    teacher: Graph | None = None,
    training: Training | None = None,
    progress: bool | None = None,
) -> tuple[Graph, QParams]:
    """Tunes weights, biases and activations' steps on calibration inputs.

    Args:
        graph: what `import_onnx` or `prune` gives.
        qparams: what `fit` gives for it. Bits, roundings and ranges stay; values in the outer parts of an accumulator's
            range, which the float model leaves free on these inputs, are pushed back: unseen ones would wrap around.
        inputs: calibration data, as for `evaluate`.
        key: a key of `jax.random`; the same key gives the same result.
        p_error: probability that a table fails, which the values shall bear: the noise at tables' inputs.
        teacher: the graph whose outputs are the targets; `graph` itself by default.
        training: options of the optimizer.
        progress: whether to show a progress bar; by default when standard error is a terminal.

    Returns:
        A graph with other weights and biases, and its quantizers.

    Raises:
        DataError: the data do not fit.
        ArgumentError: (a ValueError) p_error is outside of [0, 1], or `key` is no key.
        QuantizationError: these are another graph's quantizers.
    """
    learned = tune(graph, qparams, *inputs, key=key, p_error=p_error, teacher=teacher, training=training, progress=progress)
    return with_learned(graph, qparams, learned)


def tune(
    graph: Graph,
    qparams: QParams,
    *inputs: Array,
    key: Array,
    p_error: float,
    teacher: Graph | None,
    training: Training | None,
    progress: bool | None,
) -> Learned:
    """What `reconstruct` learns, with its arguments; on the host."""
    training = training or Training()
    check_chances(p_error)
    check_key(key)
    layout = plan_for(graph, qparams)
    data = tuple(jnp.asarray(a) for a in check_arrays(graph.inputs, inputs))
    qparams = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), qparams)
    targets = _targets(layout, split(teacher or graph)[0], *data)
    task = _Task.of(layout, training, qparams, targets, jnp.asarray(p_error, jnp.float32))
    moved = jax.tree.map(jnp.zeros_like, task.initial)
    steps = training.steps if jax.tree.leaves(moved) else 0  # movement alone has nothing to learn
    state = _optimizer(training).init(moved) if steps else ()
    for at in track(range(0, steps, BLOCK), "reconstructing", progress):
        keys = jax.random.split(jax.random.fold_in(key, at), min(BLOCK, steps - at))
        moved, state = _train(layout, replace(training, adaptive=False), task.given, moved, state, data, keys)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), task.learned(moved))


def _optimizer(training: Training) -> GradientTransformation:
    import optax

    adam = optax.adam(optax.cosine_decay_schedule(training.learning_rate, training.steps))
    # Of one vector: those of a network's many small tensors would take a tenth of the time to compile. A step whose gradient
    # is no number is left out.
    return optax.flatten(optax.apply_if_finite(adam, training.steps))


class Targets(NamedTuple):
    """Outputs of the teacher, and the results of steps of the float model, for every sample; and their mean variances."""

    outputs: tuple[Array, ...]
    hints: dict[str, Array]
    output_power: tuple[Array, ...]
    hint_power: dict[str, Array]


@compiled_for(2)
def _targets(layout: Plan, teacher: Graph, *data: Array) -> Targets:
    """Of what a teacher gives that ends where encryption does."""
    names = [step.out for step in layout.steps]

    def one(*sample: Array) -> tuple[tuple[Array, ...], dict[str, Array]]:
        return evaluate_sample(teacher, *sample), interpret(layout.graph, dict(zip(layout.inputs, sample)), targets=names)

    outputs, hints = jax.vmap(one)(*data)
    power = lambda v: jnp.maximum(jnp.mean(jnp.var(v.astype(jnp.float32), axis=0)), 1e-12)
    return Targets(outputs, hints, jax.tree.map(power, outputs), jax.tree.map(power, hints))


def _limits(layout: Plan, qparams: QParams, learned: Learned, adaptive: bool) -> dict[str, tuple[Array, Array]]:
    """The values between which weights stay: those on their grid below and above, or none."""
    found = {}
    for step in layout.steps:
        if isinstance(step, Linear) and step.out in learned.weights:
            ratio = reading(layout, qparams, step).ratio
            grid = qparams.weights[step.weight_name].expanded(step.weight.ndim).scale
            unit = grid / along_inputs(step, jnp.where(ratio == 0, 1.0, ratio))
            low, high = jnp.floor(step.weight / unit) * unit, jnp.ceil(step.weight / unit) * unit
            found[step.out] = jnp.where(adaptive, low, -jnp.inf), jnp.where(adaptive, high, jnp.inf)
    return found


@dataclass(frozen=True, eq=False)
class _Task:
    """The loss and what it refers to.

    Args:
        initial: the model's own weights.
        between: the values between which they stay.
        pace: of scales: 0 where they are not learned. As with limits, it is a value: kinds of training are compiled once.
        room: what the float model leaves free of each accumulator's range, below and above (see `_room`).
    """

    layout: Plan
    training: Training
    qparams: QParams
    targets: Targets
    p_error: Array
    initial: Learned
    between: dict[str, tuple[Array, Array]]
    pace: Array
    room: dict[str, tuple[Array, Array]]

    @classmethod
    def of(cls, layout: Plan, training: Training, qparams: QParams, targets: Targets, p_error: Array) -> _Task:
        start = initial(layout, qparams)
        between = _limits(layout, qparams, start, training.adaptive)
        pace = jnp.asarray(0.0 if training.adaptive else 1.0)
        room = {name: _room(qparams, name, hint) for name, hint in targets.hints.items() if name in qparams.accumulators}
        return cls(layout, training, qparams, targets, p_error, start, between, pace, room)

    @property
    def given(self) -> tuple[Any, ...]:
        """All but what a loss is compiled for: what differs between quantizers of a graph."""
        return self.qparams, self.targets, self.p_error, self.initial, self.between, self.pace, self.room

    @property
    def blocks(self) -> dict[str, int] | None:
        """The block of each step, by the tensor that it makes."""
        if not self.training.block:
            return None
        linear = np.cumsum([isinstance(step, Linear) for step in self.layout.steps])
        return {s.out: max(n - 1, 0) // self.training.block for s, n in zip(self.layout.steps, linear.tolist())}

    @property
    def rounded(self) -> list[Step]:
        """The steps whose accumulators tables read."""
        return [step for step in tabulated(self.layout) if step.out in self.qparams.accumulators]

    def learned(self, moved: Learned) -> Learned:
        """From what the optimizer moves, in units of each tensor's size; pruned weights stay 0."""
        size = lambda w: jnp.sqrt(jnp.mean(w**2)) + 1e-12
        weights = {o: w + size(w) * moved.weights[o] * (w != 0) for o, w in self.initial.weights.items()}
        for out, (low, high) in self.between.items():
            weights[out] = straight_through(jnp.clip(weights[out], low, high), weights[out])
        units = {out: jnp.sqrt(self.targets.hint_power[out]) for out in weights}
        biases = {out: units[out] * b for out, b in moved.biases.items()}
        return Learned(weights, biases, {first: self.pace * log for first, log in moved.scales.items()})

    def loss(self, moved: Learned, key: Array, sample: tuple[Array, ...], outputs: Any, hints: Any) -> Array:
        """Mean over a batch."""
        layout, qparams = applied(self.layout, self.qparams, self.learned(moved))
        prepared = prepare(layout, qparams)
        noise = noise_at_tables(layout, qparams, self.p_error, {name: known.scale for name, known in prepared.items()})

        def one(key: Array, sample: tuple[Array, ...], outputs: Any, hints: Any) -> Array:
            drop, disturb = jax.random.split(key)
            disturbed = partial(missed, noise, draws(layout, disturb))
            kept = self.dropped(qparams, drop)
            env = tensor_values(layout, kept, prepared, *sample, disturbed=disturbed, blocks=self.blocks)
            return self.error(layout, qparams, env, outputs, hints)

        return jnp.mean(jax.vmap(one)(jax.random.split(key, len(sample[0])), sample, outputs, hints))

    def dropped(self, qparams: QParams, key: Array) -> QParams:
        """Accumulators of which elements drawn at random are not rounded."""
        if not self.training.drop:
            return qparams
        accumulators = dict(qparams.accumulators)
        for s, k in zip(self.rounded, jax.random.split(key, len(self.rounded))):
            kept = jax.random.bernoulli(k, 1 - self.training.drop, s.shape)
            accumulators[s.out] = replace(accumulators[s.out], lsbs=accumulators[s.out].lsbs * kept)
        return replace(qparams, accumulators=accumulators)

    def error(self, layout: Plan, qparams: QParams, env: Mapping[str, Array], outputs: Any, hints: Any) -> Array:
        """Relative squared errors of outputs and intermediate results, and the reach beyond accumulators' ranges."""
        relative = lambda y, t, power: jnp.mean((y - t) ** 2) / power
        targets = self.targets
        own = sum(map(relative, output_values(layout, qparams, env), outputs, targets.output_power))
        inner = sum(relative(env[name], t, targets.hint_power[name]) for name, t in hints.items()) / max(len(hints), 1)
        beyond = PUSH * sum(_beyond(qparams, s.out, env[s.out], self.room[s.out]) for s in self.rounded)
        return own + self.training.hints * inner + beyond


def _ends(qparams: QParams, name: str, ndim: int) -> tuple[Array, Array]:
    """The real values at the ends of an accumulator's range, to broadcast against its tensor."""
    a = qparams.accumulators[name].expanded(ndim)
    return a.scale * (a.qmin - a.zero_point), a.scale * (a.qmax - a.zero_point)


def _room(qparams: QParams, name: str, samples: Array) -> tuple[Array, Array]:
    """What samples leave free of an accumulator's range, below and above, as shares of it: room for unseen ones."""
    low, high = _ends(qparams, name, samples.ndim - 1)
    shape = np.broadcast_shapes(np.shape(low), (1,) * (samples.ndim - 1))
    inner = (0, *(axis + 1 for axis, size in enumerate(shape) if size == 1))
    least, most = (f(samples, axis=inner, keepdims=True)[0] for f in (jnp.min, jnp.max))
    share = lambda free: jnp.clip(free / (high - low), EDGE, 0.5 - EDGE)
    return share(least - low), share(high - most)


def _beyond(qparams: QParams, name: str, y: Array, room: tuple[Array, Array]) -> Array:
    """Mean square of how far values are in the outer parts of an accumulator's range, in units of these parts."""
    low, high = _ends(qparams, name, y.ndim)
    middle = jax.lax.stop_gradient((low + high) / 2)  # other scales leave it where it is (see `same_range`)
    place = (y - middle) / (high - low)  # from -1/2 to 1/2
    below, above = room
    return jnp.mean(jnp.maximum((below - 0.5 - place) / below, 0) ** 2 + jnp.maximum((place + above - 0.5) / above, 0) ** 2)


@compiled_for(2, kept=4)
def _train(
    layout: Plan,
    training: Training,
    given: tuple[Any, ...],
    moved: Learned,
    state: Any,
    data: tuple[Array, ...],
    keys: Array,
) -> tuple[Learned, Any]:
    """An optimizer step for each key, of the task that has these parts."""
    task, optimizer = _Task(layout, training, *given), _optimizer(training)

    def body(carry: tuple[Learned, Any], key: Array) -> tuple[tuple[Learned, Any], None]:
        moved, state = carry
        draw, noise = jax.random.split(key)
        at = jax.random.randint(draw, (min(training.batch_size, len(data[0])),), 0, len(data[0]))
        batch: Callable[[Any], Any] = lambda tree: jax.tree.map(lambda v: v[at], tree)
        gradient = jax.grad(task.loss)(moved, noise, batch(data), batch(task.targets.outputs), batch(task.targets.hints))
        update, state = optimizer.update(gradient, state)
        return (jax.tree.map(jnp.add, moved, update), state), None

    return jax.lax.scan(body, (moved, state), keys)[0]
