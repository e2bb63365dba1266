"""The benchmark: single layers and whole networks on the CPU, against the engines one would use instead.

    make bench                              README's table and the blocks of ParNet-S and M: twenty minutes
    make bench BENCH_ARGS=--quick           about a minute
    python -m bench cpu --suite all --variants s,m,l,xl --minutes 300
    python -m bench cpu --suite net --variants s,m --batch 1 --threads 1 --engines ours,onnxruntime,ncnn
    python -m bench cpu --isa avx2          what processors without AVX-512 do, on one that has it
    python -m bench profile --variants s    our layers within a run
    python -m bench calls                   what public operators cost beside their kernels
    python -m bench int8                    int8 and bfloat16 networks: see "How it measures"
    python -m bench ablation                what ParNet's parts are worth: see bench/ablation.py
    python -m bench gpu                     on a GPU: see bench/gpu/__init__.py
    python -m bench convolutions --write    on a GPU: which convolutions training takes, see bench/gpu/convolutions.py
    pip install -e '.[peers]'               the other engines; a missing one is reported

`cpu`, `int8` and `gpu` write results.csv, results.json, results.md and plots to out/bench/<time>. Tables have
80 columns at most; in a pipe they are tab-separated lines, and lines that begin with #.

How it measures
---------------
* A cell is a workload (a network, or one layer at the size it has there), a batch size and a number of threads. Each
  engine runs in a process of its own with its thread count set; all but the one being measured are stopped.
* Every engine gets the deployed network in its best form: branches and BatchNorms folded, channel shuffles folded into
  weights, frozen and prepacked weights, its preferred layout; of several ways to write a layer the fastest right one.
* First an engine's result is compared with the float64 reference (`parnet_kernels.reference`): ‖y − r‖ / ‖r‖ must be at
  most 3e-6 for our layers, 5e-6 for our networks and 2e-3 for others. A wrong result gets no time. The error stands
  below every time: an engine may be fast because it computes less accurately.
* `int8` compares engines within groups of the same numbers, int8 or bf16; our float32 network stands beside them. There
  a result may be off by what rounding costs (0.2 and 0.05, norm-wise), and the error printed tells how much that is.
  ONNX Runtime and OpenVINO are given our int8 numbers as a QDQ file and the float32 network to be quantised by
  themselves (OpenVINO with NNCF), all calibrated on the same pictures; the faster one counts, "form" names it.
* Then rounds A B C …, B C … A, … of short bursts, so that a change of the machine's speed meets all engines. Reported
  are the median of all runs and the 10th and 90th percentiles.
* Single layers take turns with so many distinct weights that these are cold, as in a network where all other layers lie
  between two uses: 1.75 times the last cache, but at most 1/256 of memory. Inputs and outputs are as an engine's
  interface has them: ncnn's stay packed, torch's have the layout of the column; ONNX Runtime, OpenVINO and MNN may
  reorder them, which they avoid inside a network.

How to read the numbers
-----------------------
* Compare within one run only, and only if the machine was idle: its load at the start is reported.
* GFLOP/s are effective: the arithmetic of the direct convolution over the time. Winograd's algorithm does fewer
  multiplications, so they may exceed the machine's measured FMA peak, and so may "of direct limit" exceed 100 %. "Of
  Winograd limit" counts Winograd's multiplications instead, no transforms (`bench.limits`).
* "vs best peer" is the fastest right peer's median over ours, "vs compile" the faster torch.compile's.

The files: `workloads` (what is run), `lowering` and `onnx_model` (in which form), `engines` (by whom), `worker` and
`process` (where), `measure` (how often), `machine` and `limits` (what is possible), `report`, `tables` and `plot`,
`profile`, `calls`.
"""
