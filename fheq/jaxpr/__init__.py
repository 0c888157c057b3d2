"""JAX functions as graphs: what `jax.make_jaxpr` traces, primitive by primitive."""

from fheq.jaxpr.importer import from_jax as from_jax
