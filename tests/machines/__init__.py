"""What takes a Ray cluster, processes that are killed, or a model shared by several processes.

Run by `.ci/ray`; the names of the files keep them out of the default suite.
"""
