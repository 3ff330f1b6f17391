"""Plans work on a pod without having it: memory, compute, collectives, lower limits and an estimate of the time.

For TPUs the real program is compiled for the absent chips (`planning`), and the compiled program is analyzed. XLA
compiles for a GPU only on a machine that has one, so the plan of a GPU contains only the numbers that follow from array
shapes: the bytes that stay on a chip, and the model's floating-point operations. No array is allocated in either case.
"""
