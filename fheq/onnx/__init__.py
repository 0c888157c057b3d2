"""ONNX models to graphs; the only package that imports onnx."""

from fheq.onnx.importer import import_onnx as import_onnx
from fheq.onnx.importer import problems as problems
