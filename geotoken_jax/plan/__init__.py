"""Plans work on a pod without using it: memory, compute, collectives, lower limits of the time and an estimate of it.

For TPUs, the real program is compiled for the absent chips and the compiled program is analyzed (see `planning`). For
GPUs, nothing is compiled, because XLA compiles for a GPU only on a machine with a GPU. The plan of a GPU has only the
numbers that follow from array shapes: the bytes that stay on a chip, and the model's floating-point operations. No
array is allocated in either case.
"""
