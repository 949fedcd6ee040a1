"""Benchmarks of danet_kernels: run the scripts of this folder, see docs/benchmarks.md."""
