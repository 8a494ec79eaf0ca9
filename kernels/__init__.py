"""Tensor-to-tensor operations, each beside its plain-torch meaning."""
