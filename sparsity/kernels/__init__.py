"""One decoding step on a fixed pool of pages: Triton kernels on CUDA, plain torch elsewhere.

Each function stands beside its plain twin, which says what the kernel computes; the kernels
themselves are in the files ending in ``_triton``, which are imported when a CUDA tensor comes
first. Every function compiles with ``torch.compile(fullgraph=True)`` and captures in a CUDA graph.
"""
