"""What a link does on a GPU: Triton kernels on CUDA, each beside its twin in plain torch.

The kernels are in the files ending in ``_triton``, which are imported when a CUDA tensor comes
first. Nothing waits for the device or depends on what is in a tensor, so that every function
captures in a CUDA graph, once a call outside of a capture has built its kernel.
"""
