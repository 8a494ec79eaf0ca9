"""The Triton kernels, imported only where a tensor is on a GPU: Triton takes 80 MB to import."""
