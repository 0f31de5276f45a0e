"""Batched kernels on stacks of matrices and tensors: polar factors, eigenbases, Kronecker factors.

Pure functions of tensors that know nothing of optimizers. Every leading dimension is independent of the others: a
stack of k matrices gives what k calls give.
"""
