"""What a quantization shall look like: bits, granularity, observers, rounding, ranges. All options are frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from fheq.arguments import is_number, is_whole
from fheq.errors import QuantizationError
from fheq.observers import MeanSquaredError, Observer, check_observer

DEFAULT_MODEL_BITS = 5
MAX_TABLE_BITS = 16
MAX_BITS = 24  # float32, in which models compute, tells no more apart
_KEYS = ("op_inputs", "op_weights", "model_inputs", "model_outputs")


class BitsError(QuantizationError, ValueError):
    """An `n_bits` or rounding argument breaks the rules."""


class Granularity(Enum):
    """How many quantizers a tensor has."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"


class Symmetry(Enum):
    """Range of a weight quantizer: around zero, from minimum to maximum, or whichever has the smaller error per channel."""

    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"
    AUTOMATIC = "automatic"


class AccumulatorRange(Enum):
    """What sizes an accumulator: the range seen in calibration with a margin, or what weights and inputs can reach."""

    OBSERVED = "observed"
    WORST_CASE = "worst_case"


@dataclass(frozen=True)
class Rounding:
    """Accumulators lose their low bits so that tables read at most `n_bits` bits (2 to 8).

    Args:
        n_bits: bits left.
        approximate: concrete's APPROXIMATE rounding (much cheaper; a value near the edge of two cells may fall into either)
            instead of EXACT.
    """

    n_bits: int
    approximate: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.n_bits) or not 2 <= self.n_bits <= 8:
            raise BitsError(f"rounding n_bits must be an integer from 2 to 8, got {self.n_bits!r}")


def get_n_bits_dict(n_bits: int | Mapping[str, int]) -> dict[str, int]:
    """The four bit-widths of a model: op_inputs, op_weights, model_inputs, model_outputs.

    Args:
        n_bits: an int for op_inputs and op_weights (model_inputs and model_outputs get max(5, n_bits)), or a mapping that
            has op_inputs and op_weights and may have model_inputs (default 5) and model_outputs (default max(5, op_inputs)).

    Raises:
        ValueError: an unknown or missing key, a value that is no integer or not from 1 to 24, model_outputs below op_inputs.
    """
    if isinstance(n_bits, Mapping):
        given = dict(n_bits)
        unknown = sorted(set(map(str, given)) - set(_KEYS))
        if unknown:
            raise BitsError(f"n_bits has unknown keys {unknown}; it takes {list(_KEYS)}")
        missing = [key for key in _KEYS[:2] if key not in given]
        if missing:
            raise BitsError(f"n_bits must have the keys 'op_inputs' and 'op_weights'; {missing} missing")
        for key, value in given.items():
            _check_bits(f"n_bits[{key!r}]", value)
        given.setdefault("model_inputs", DEFAULT_MODEL_BITS)
        given.setdefault("model_outputs", max(DEFAULT_MODEL_BITS, given["op_inputs"]))
    else:
        _check_bits("n_bits", n_bits)
        wide = max(DEFAULT_MODEL_BITS, n_bits)
        given = dict(zip(_KEYS, (n_bits, n_bits, wide, wide)))
    if given["model_outputs"] < given["op_inputs"]:
        raise BitsError(
            f"n_bits['model_outputs'] ({given['model_outputs']}) must not be below "
            f"n_bits['op_inputs'] ({given['op_inputs']})"
        )
    return {key: int(given[key]) for key in _KEYS}


def _check_bits(what: str, value: object) -> None:
    if not is_whole(value):
        raise BitsError(f"{what} must be an integer, got {value!r}")
    if int(value) < 1:
        raise BitsError(f"{what} must be at least 1, got {value}")
    if int(value) > MAX_BITS:
        raise BitsError(f"{what} must be at most {MAX_BITS}, got {value}")


def _check_kinds(options: Override | Spec, kinds: Mapping[str, type]) -> None:
    """Checks what cannot be told apart later on: a word in place of a choice would be as good as none."""
    for name, kind in kinds.items():
        value = getattr(options, name)
        if value is not None and not isinstance(value, kind):
            choices = f" ({', '.join(map(str, kind))})" if issubclass(kind, Enum) else ""
            raise QuantizationError(f"{name} must be a {kind.__name__}{choices}, got {value!r}")
    for name in ("observer", "input_observer"):
        observer = getattr(options, name, None)
        if observer is not None:
            check_observer(name, observer)


@dataclass(frozen=True)
class Override:
    """Options for one tensor or one node's result and weights; None keeps what the `Spec` says."""

    n_bits: int | None = None
    granularity: Granularity | None = None
    observer: Observer | None = None
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        if self.n_bits is not None:
            _check_bits("an override's n_bits", self.n_bits)
        _check_kinds(self, {"granularity": Granularity, "rounding": Rounding})


@dataclass(frozen=True)
class Spec:
    """A quantization.

    Args:
        n_bits: see `get_n_bits_dict`. What the model quantizes itself takes no bits from here: op_inputs is for what it
            leaves open, and for tensors inside of an operator that is computed in parts (the exponentials and the sum of a
            Softmax, the gates of an LSTM). None leaves nothing to bits: `fit` then names what the model does not state.
        activations: granularity of activations. Per channel is used where the next linear op can absorb the scales.
        weights: granularity of weights.
        symmetry: ranges of weights.
        observer: ranges of activations inside the model.
        input_observer: ranges of the model's inputs.
        rounding: of accumulators before tables; None keeps all bits (up to 16, the widest table).
        output_rounding: of accumulators that are decrypted, approximate: with every bit that an output has less, all tables
            before it may be noisier, which makes them cheaper. None keeps all bits.
        accumulators: what sizes accumulators.
        margin: least fraction of an observed accumulator range that is added at both ends when a thousand values were seen;
            more data need less, heavy tails more (see `fheq.fitting.accumulator_ranges.unseen_reach`).
        overrides: by tensor name, weight name or node name.
    """

    n_bits: int | Mapping[str, int] | None = DEFAULT_MODEL_BITS
    activations: Granularity = Granularity.PER_CHANNEL
    weights: Granularity = Granularity.PER_CHANNEL
    symmetry: Symmetry = Symmetry.AUTOMATIC
    observer: Observer = field(default_factory=MeanSquaredError)
    input_observer: Observer = field(default_factory=MeanSquaredError)
    rounding: Rounding | None = None
    output_rounding: Rounding | None = None
    accumulators: AccumulatorRange = AccumulatorRange.OBSERVED
    margin: float = 0.15
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_bits is not None:
            get_n_bits_dict(self.n_bits)
        kinds = {"activations": Granularity, "weights": Granularity, "symmetry": Symmetry, "accumulators": AccumulatorRange}
        _check_kinds(self, {**kinds, "rounding": Rounding, "output_rounding": Rounding, "overrides": Mapping})
        for name, override in self.overrides.items():
            if not isinstance(override, Override):
                raise QuantizationError(f"overrides[{name!r}] must be an Override, got {override!r}")
        if self.output_rounding is not None and not self.output_rounding.approximate:
            raise QuantizationError("output_rounding must be approximate: exact rounding takes tables and saves none here")
        if not is_number(self.margin) or not 0 <= self.margin <= 10:
            raise QuantizationError(f"margin must be between 0 and 10 (a fraction of the range), got {self.margin!r}")

    def bits(self) -> dict[str, int]:
        """The four bit-widths.

        Raises:
            BitsError: there are none.
        """
        if self.n_bits is None:
            raise BitsError("n_bits is None, which is for models that state all their quantizers; give n_bits")
        return get_n_bits_dict(self.n_bits)

    def override(self, *names: str) -> Override:
        """The first override found under one of the names."""
        return next((self.overrides[name] for name in names if name and name in self.overrides), Override())


def as_spec(spec: int | Mapping[str, int] | Spec | None) -> Spec:
    """An int or an n_bits mapping (or None) to a `Spec`; a `Spec` as it is."""
    return spec if isinstance(spec, Spec) else Spec(n_bits=spec)
