"""Tests of the simulator itself; none of them needs the package's kernels."""
