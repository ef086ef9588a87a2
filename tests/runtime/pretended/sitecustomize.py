"""On the PYTHONPATH of workers, makes torch's CPU pass for the GPU that they leased.

Without CUDA a worker gives its lease back, so its life with a lease could be seen on GPU machines alone. Here
`headsearch.core.device` says that CUDA works and that each device is the CPU; all else is the real worker. Once
for each file that ``$PRETENDED_POISON`` names and that is there, the device is CUDA's, on which the first trial
breaks as it does on a GPU whose context is poisoned; the file is removed.
"""

import importlib.util
import os
import sys
from pathlib import Path

DEVICES = "headsearch.core.device"


class Pretender:
    """Finds the module, and changes it once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != DEVICES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            pretend(module)

        spec.loader.exec_module = exec_module
        return spec


def pretend(module):
    import torch

    poison = Path(os.environ.get("PRETENDED_POISON", "/nonexistent"))
    device = torch.device("cpu")
    if poison.exists():
        poison.unlink()
        device = torch.device("cuda", 0)
        torch.cuda.get_device_name = lambda _: "poisoned"
    module.pick_device = lambda _: device
    module.cuda_problem = lambda: None


sys.meta_path.insert(0, Pretender())
