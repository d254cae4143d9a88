"""Make `import torchvision` possible beside a CPU-only torch.

The torchvision wheel of the package index is linked against CUDA. Next to a CPU build of torch its C++ library does not
load, the operators `nms` and `qnms` stay undefined, and `import torchvision` fails while registering their shape rules
(torchvision 0.28, torch 2.13) - and with it every transformers class that owns a video processor. Declaring the two
schemas is enough: nothing in this project calls them, and calling one still raises, because it has no kernel.
"""

from __future__ import annotations

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept_alive: list[torch.library.Library] = []  # a Library that is collected takes its operators with it


def declare_missing_torchvision_ops() -> None:
    """Declare `torchvision::nms` and `::qnms` when, and only when, torch does not know them. Idempotent."""
    try:
        import torchvision  # noqa: F401  (registers its own operators where its library loads)
    except ImportError:
        return  # not installed: transformers says so in its own words
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(name + _SCHEMA)
        _kept_alive.append(library)


declare_missing_torchvision_ops()
