"""How many tables a model will apply and how long its sums are, from its plan alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fheq.plan import Plan
from fheq.regions import is_boolean
from fheq.steps import Linear, Maximum, Product, Step, Sum


def predicted_tables(layout: Plan) -> Mapping[str, int]:
    """Table applications of one sample by what they are for: "activations", "products" and "maxima".

    An activation takes one for each element, a product of encrypted numbers two squares, or one table where a factor is 0 or
    1, a maximum one less than it has operands. Lowering may find some of them twice and apply them once.
    """
    points = sum(int(np.sum(layout.regions[point].elements >= 0)) for point in layout.points)
    both = [step for step in layout.steps if isinstance(step, Product)]
    products = sum((1 if _chooses(layout, s) else 2) * math.prod(s.operands[0].shape) for s in both)
    maxima = sum(math.prod(s.shape) * (sum(x.shape[-1] for x in s.xs) - 1) for s in layout.steps if isinstance(s, Maximum))
    return {"activations": points, "products": products, "maxima": maxima}


def _chooses(layout: Plan, step: Product) -> bool:
    return any(is_boolean(layout.graph, operand.key) for operand in step.operands)


def largest_sum(layout: Plan) -> int:
    """The number of terms of the longest sum; 0 without any."""
    return max((_terms(step) for step in layout.steps), default=0)


def _terms(step: Step) -> int:
    if isinstance(step, Linear):
        return step.weight[0].size if step.form == "conv" else step.weight.shape[-2 if step.form == "matmul" else -1]
    if isinstance(step, Sum) or (isinstance(step, Product) and step.contract):
        return step.operands[0].shape[-1]
    return 0
