"""How arrays are computed: with numpy or JAX, compiled, and on many devices."""
