"""A ParNet on several devices, its streams side by side: see `StreamParallel`."""

from parnet_kernels.distributed.cost import Device as Device
from parnet_kernels.distributed.cost import Link as Link
from parnet_kernels.distributed.cost import Placement as Placement
from parnet_kernels.distributed.devices import DeviceParallel as DeviceParallel
from parnet_kernels.distributed.parallel import StreamParallel as StreamParallel
from parnet_kernels.distributed.peers import DistributedError as DistributedError
