"""The benchmark on a CUDA device: `python -m bench gpu [--suite net,ops,train,levels] [--dtypes fp16,tf32]`.

How it measures
---------------
* A cell is a workload (a network, one layer at the size it has there, or a training step of either), a batch size and
  a number format. All engines of a cell live in this process, on one device and one stream.
* First each engine's result is compared with the float64 reference of the rounded parameters and inputs, norm-wise
  (`tasks.TOLERANCE`), and again after the capture of a graph and after the last timed call. No time is given for a
  wrong result. "fp32" is exact float32 and "tf32" one tf32 product, for all engines alike (torch.backends).
* Then rounds A B C, B C A, … of samples. A sample is a pair of CUDA events around calls, in one of three modes:
    warm   as many calls in a row as last about a millisecond; includes what the host takes if it is slower
    cold   one call, after a buffer twice the size of the L2 cache was overwritten; the host's launches overlap with
           that, so short calls show the device's time
    graph  as warm, each call a replay of a captured CUDA graph
  Reported are the median and the 10th and 90th percentiles over the samples.
* In "graph", ours is `DeployedParNet.capture()`, replayed on its own input; torch.compile is captured without graphs
  of its own. Single layers have one copy of their weights: "cold" is what a layer finds in a large network.
* A training step is the forward and backward of folded layers, with the gradients of every parameter (and of a single
  layer's inputs), compared one by one; no optimizer, no BatchNorm.

The files: `timing` (events, cache, graphs; the one part that needs a device), `tasks` (what is run and what is right),
`engines`, `tensorrt`, `measure` (order and statistics), `levels` (each launch of ours beside its modelled time),
`main`; `convolutions` is a command of its own. Workloads, tables and plots are those of the CPU's benchmark.
"""
