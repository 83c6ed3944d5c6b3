"""Triton kernels, one operation a module: `from siren.kernels import rvq_embed`.

They import torch and triton and nothing of siren. Importing this package needs no triton; importing a module does.
All were compiled for sm_80 to sm_120 and run in Triton's interpreter; none has run on a GPU yet.
"""
