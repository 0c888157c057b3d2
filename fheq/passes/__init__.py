"""Passes over integer programs: what `lower` does last, so that no table is applied for nothing."""

from fheq.passes.simplify import simplify as simplify
