"""A rehearsal of training on GPUs, on a machine without one: fake CUDA tensors and a watch over what would wait.

Tensors on the GPU are torch's fake tensors, which have a shape, a dtype and a device but no values. Tensors on the host
are real, so that data, settings and checkpoints are those of a run. `guard` makes autograd accept the fake tensors,
`cuda` and `ranks` stand in for torch.cuda and torch.distributed, `watch` sees every operation, `findings` keeps what
was found, and `run` trains.
"""
