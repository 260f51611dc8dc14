"""Import torchvision where its operators were built for another torch (a CUDA wheel beside a CPU torch).

torchvision is only open_clip's and transformers' optional companion, but a mismatched one takes both down with
"operator torchvision::nms does not exist". Imported before either, this module tries the import; on exactly that error
it drops the half-imported modules, defines the two missing schemas and imports again. A healthy install is left alone.
"""

from __future__ import annotations

import importlib
import sys

import torch

_LIBRARIES: list[torch.library.Library] = []  # a Library's definitions live as long as the object


def patch_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # not installed: nobody needs it
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
