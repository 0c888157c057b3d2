"""Comparisons that take minutes; the tests hold small versions of them."""
