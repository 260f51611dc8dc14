"""Networks. Importing this package also prepares a repair of a torchvision that was built for another torch.

The import of such a torchvision (a CUDA wheel beside a CPU torch) fails with "operator torchvision::nms does not
exist", and with it that of open_clip, transformers and diffusers. On exactly that error the two missing operators are
defined, and it is imported again. Nothing here imports it: the repair waits for whoever does.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

_LIBRARIES: list[torch.library.Library] = []  # keeps the definitions alive


class TorchvisionFinder(MetaPathFinder):
    """Finds torchvision as Python would, with a loader that repairs it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # or this would find itself
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = TorchvisionLoader(spec.loader)
        sys.meta_path.insert(0, self)
        return spec


class TorchvisionLoader(Loader):
    """A loader that defines torchvision's missing operators where it asks for them, and loads it again."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
        except RuntimeError as error:
            if "operator torchvision::nms does not exist" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _LIBRARIES.append(library)
            self.loader.exec_module(module)


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, TorchvisionFinder())
