"""A package, so that the benchmark can use the simulator and the helpers of tests by their full names."""
