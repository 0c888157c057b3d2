"""Passes over integer programs: what `lower` does last, so that no table is applied, and no bit read, for nothing."""

from fheq.passes.blocks import read_in_blocks as read_in_blocks
from fheq.passes.merge import merge_tables as merge_tables
from fheq.passes.narrow import narrow_wide as narrow_wide
from fheq.passes.simplify import simplify as simplify
