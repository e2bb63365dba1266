"""Classes of very many pictures with Ray Data: tasks decode on every core, actors hold the network.

    python examples/ray_predict.py photos net.safetensors results

writes results/*.csv with the columns image, label, probability and error: a picture that cannot be read costs itself.
Needs `pip install "ray[data]"`. On a cluster the folder and the network must be at the same place on every machine.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from parnet_kernels import Preprocessing, load_model
from parnet_kernels.app.images import fitted, normalised, open_image, pixels_of
from parnet_kernels.app.sources import pictures


def decode(row: dict[str, Any], preprocessing: Preprocessing) -> dict[str, Any]:
    """A path → its pixels as the network wants them, uint8 [height, width, C], or an error and black pixels."""
    p = preprocessing
    try:
        pixels = fitted(pixels_of(open_image(row["image"], p.color), p), p, row["image"]).numpy()
        return {"image": row["image"], "pixels": np.ascontiguousarray(pixels), "error": ""}
    except (OSError, ValueError) as error:
        black = np.zeros((p.height, p.width, p.channels), dtype=np.uint8)
        return {"image": row["image"], "pixels": black, "error": str(error)}


class Classify:
    """An actor: packs the weights once, then classifies batches."""

    def __init__(self, network: str, preprocessing: Preprocessing, threads: int) -> None:
        torch.set_num_threads(threads)
        self.network, self.preprocessing = load_model(network).prepare(), preprocessing

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = self.network.class_names or tuple(map(str, range(self.network.num_classes)))
        with torch.inference_mode():
            x = normalised([torch.from_numpy(pixels) for pixels in np.array(batch["pixels"])], self.preprocessing)
            probabilities, classes = self.network(x).softmax(1).max(1)
        good = batch["error"] == ""
        return {
            "image": batch["image"],
            "label": np.where(good, [names[i] for i in classes.tolist()], ""),
            "probability": np.where(good, probabilities.numpy(), np.nan),
            "error": batch["error"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("photos", help="folder, file or pattern")
    parser.add_argument("network", help="file of parnet-kernels")
    parser.add_argument("results", help="folder to write")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each actor")
    asked = parser.parse_args()
    network = load_model(asked.network)
    preprocessing = network.preprocessing or Preprocessing.assumed(network.config.in_chans)
    rows = [{"image": os.path.abspath(path)} for path in pictures([asked.photos], [])]
    dataset = ray.data.from_items(rows).map(decode, fn_kwargs={"preprocessing": preprocessing})
    dataset = dataset.map_batches(
        Classify,
        fn_constructor_args=(str(Path(asked.network).resolve()), preprocessing, asked.threads),
        batch_size=16,
        concurrency=asked.actors,
        num_cpus=asked.threads,
    )
    dataset.write_csv(os.path.abspath(asked.results))


if __name__ == "__main__":
    main()
