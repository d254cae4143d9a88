"""The model card of a folder: what it is and how to load it, from its own settings. It claims no results."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stts.pruners.base import Pruner

_COMPLETE = """The folder is complete: `AutoModelForImageTextToText` loads it as the stock class, which runs unpruned;
with `stts` it runs pruned."""
_SCORER_ONLY = """The folder holds the pruner alone. The weights of the model are those of the base, unmodified, and are
loaded from there; `base_model=` names another place to load them from."""
_CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
{base_line}tags: [stts, video-token-pruning]
---

# {title} under {pruner}

{content}

| | |
|---|---|
| base | {base} (`{family}`) |
| method | `{pruner}`: {method} |
| papers | {papers} |
| options | `{options}` |
| retention_ratio | {retention_ratio}: the fraction of visual tokens kept |
| positions | {positions} |

```python
import stts

vlm = stts.PrunedVLM.from_pretrained("FOLDER_OR_HUB_ID")
inputs = vlm.processor(text=[text], videos=[frames], return_tensors="pt")
answer = vlm.generate(**inputs, max_new_tokens=64)
```
"""


def model_card(settings: Mapping[str, Any], pruner: Pruner, *, scorer_only: bool) -> str:
    """README.md of a folder with these settings (`stts.json`); a local base is named, but not linked."""
    text, base = inspect.getdoc(type(pruner)) or "", settings["base"]
    local = base is None or Path(base).is_absolute()
    papers = dict.fromkeys(re.findall(r"arXiv[ :](\d{4}\.\d{5})", text))
    return _CARD.format(
        **{key: settings[key] for key in ("pruner", "family", "retention_ratio", "positions")},
        base_line="" if local else f"base_model: {base}\n",
        title="A video VLM" if base is None else Path(base).name,
        content=_SCORER_ONLY if scorer_only else _COMPLETE,
        base="not named" if base is None else Path(base).name if local else base,
        method=text.partition("\n")[0],
        papers=", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers) or "none",
        options=json.dumps(settings["options"]),
    )
