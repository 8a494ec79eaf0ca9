"""Kernels measured on a GPU: right on fresh inputs first, then timed beside what it can do."""
