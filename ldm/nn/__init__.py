"""Networks. Importing this package also works around a torchvision that was built for another torch.

Such a torchvision (a CUDA wheel beside a CPU torch) makes the import of open_clip and transformers fail with "operator
torchvision::nms does not exist". On exactly that error the two missing operators are defined before importing it again.
"""

from __future__ import annotations

import importlib
import sys

import torch

_LIBRARIES: list[torch.library.Library] = []  # keeps the definitions alive


def patch_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # optional
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        importlib.import_module("torchvision")


patch_torchvision()
