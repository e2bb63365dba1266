"""Everything that a first look at a GPU needs, in nine minutes: `make gpu-check`, `python -m bench.gpu_check`.

For anybody with a GPU, nvcc and a torch of their own: no environment is made and nothing is downloaded. Builds in place
for the card's architecture with the running Python, then: self-test, each level's time beside its modelled one, whole
networks and a training step against other engines, convolutions of training beside the library's, the tests that need
a GPU, and, where ncu and compute-sanitizer are installed, one profiled pass over ParNet-S and a memory and a race check
of a tiny network. Each step has a time box and a log; a table of all steps stands at the end, and everything lies in
one tar file.

    python -m bench.gpu_check --rehearse    without a GPU: every step as far as it can go

Exit status: 0 all is well; 1 a step failed; 2 something is missing, which one line says, with what was left out.

The files: `facts` (what there is, and what is wrong with it), `steps` (what is run), `run` (time boxes, logs, table,
tar), `network` (the program that ncu and compute-sanitizer look at). Only the standard library until the package is
built.
"""
