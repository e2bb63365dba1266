"""`python -m parnet_kernels.train DATA …`: `parnet train`, for `torchrun -m`."""

from parnet_kernels.app.cli import main

if __name__ == "__main__":
    main("train")
