"""Triton kernels, one operation a module: `from siren.kernels import rvq_embed`.

They import torch and triton and nothing of siren. Importing this package needs no triton; importing a module does.
"""
