"""Training with Lightning; installed as `stts_train`, so that it cannot shadow a user's own `train.py`."""

from __future__ import annotations

import stts  # noqa: F401  (declares torchvision's missing operators; Lightning imports torchvision on its way)
