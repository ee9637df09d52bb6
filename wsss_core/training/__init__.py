"""One training loop for every model: SGD with poly decay, a checkpoint every epoch.

A resumed training ends with the same weights, bitwise on CPU.
"""
