"""Which streams go where: what was asked for, checked, and the cost model's choice for each shape of images."""

from __future__ import annotations

from collections.abc import Sequence

from parnet_kernels.config import ParNetConfig
from parnet_kernels.distributed.cost import Device, Link, Model, Placement

TRUNK = ("auto", "recompute", "send")
MAX_KEPT = 128


def require(condition: bool, argument: str, requirement: str, got: object) -> None:
    """Raises:
    ValueError: unless `condition`.
    """
    if not condition:
        raise ValueError(f"parnet_kernels: `{argument}` must {requirement}, got {got}")


class Placements:
    """Of a network's streams on `world` places.

    Args:
        places: what they are called in messages: "ranks".
        streams: for each place, the numbers of its streams; None: whichever the cost model finds fastest.
        trunk: see `Model.best`.
        image_sent: whether only the first place has the images.

    Raises:
        ValueError: for streams or a trunk that cannot be.
    """

    def __init__(
        self,
        config: ParNetConfig,
        world: int,
        places: str,
        streams: Sequence[Sequence[int]] | None,
        trunk: str,
        image_sent: bool,
    ) -> None:
        require(trunk in TRUNK, "trunk", f"be one of {TRUNK}", repr(trunk))
        if streams is not None:
            streams, count = [list(own) for own in streams], config.streams
            complete = sorted(s for own in streams for s in own) == [*range(count)]
            right = f"give each of {world} {places} at least one of the streams 0 to {count - 1}, each stream once"
            require(complete and len(streams) == world and all(streams), "streams", right, streams)
        self.streams = streams
        self._config, self._world, self._trunk, self._image_sent = config, world, trunk, image_sent
        self._kept: dict[object, Placement] = {}

    def best(self, shape: Sequence[int], itemsize: int, sent: int, costs: tuple[Device, Link]) -> Placement:
        """For images of this shape [N, in_chans, H, W]; sizes of values as of `Model`."""
        key = tuple(shape), itemsize, sent, costs
        found = self._kept.get(key)
        if found is None:
            model = Model(self._config, shape, itemsize, sent)
            found = model.best(self._world, *costs, self.streams, self._trunk, self._image_sent)
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = found
        return found
