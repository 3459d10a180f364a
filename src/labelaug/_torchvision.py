"""The one place that imports torchvision, so that it also imports beside a CPU-only torch."""

import sys
from types import ModuleType

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def load() -> ModuleType:
    """Import torchvision and return it; afterwards a plain ``import torchvision…`` works everywhere.

    Where torchvision's compiled part does not fit the installed torch (a wheel built for CUDA beside a CPU-only torch),
    its import stops at ``operator torchvision::nms does not exist``. Only then are the two schemas that the import asks
    for declared, and the import is repeated: data sets, models and transforms work, box operators do not.
    Where the pair is whole, this is ``import torchvision`` and nothing else.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[module]  # the half-imported package
        for operator, schema in _SCHEMAS.items():
            torch.library.define(f"torchvision::{operator}", schema)
        import torchvision
    return torchvision
