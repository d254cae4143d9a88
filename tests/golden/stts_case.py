"""One case of the STTS vectors as a host model: slots of the batch, a tower of stock SigLIP blocks, the connector.

Shape suffixes: B = batch rows, T = slots per row, S = B * T slots, N = patches per slot, D = width, P = groups per
slot, W = patches per group, R = packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from stts.budget import from_removed, plan
from stts.models.families import attention
from stts.models.families.base import TowerInput
from stts.models.pruning.tower import Drop, run_tower
from stts.pruners.scorer import WindowPooling
from stts.pruners.stts import STTS
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.golden.stts_rows import reference_rows

Kind = Literal["image", "video", "padding"]
POOLING = {"query": "wq", "key": "wk", "value": "wv", "out": "wo"}


@dataclass(frozen=True)
class Part:
    """Neighbouring slots that belong together."""

    kind: Kind
    start: int
    num_frames: int


def parts(case: Any) -> list[Part]:
    """The slots of the flattened batch. Modality codes: 1 image, 2 video; -1 = no entry."""
    found: list[Part] = []
    for row, (counts, kinds) in enumerate(zip(case["num_images"].tolist(), case["modality"].tolist(), strict=True)):
        start, end = row * case.meta["T"], (row + 1) * case.meta["T"]
        for count, kind in zip(counts, kinds, strict=True):
            if count > 0:
                found.append(Part("video" if kind == 2 else "image", start, count))
                start += count
        found += [Part("padding", slot, 1) for slot in range(start, end)]
    return found


def make_stage(case: Any, **options: Any) -> STTS:
    """STTS with the weights of the case, in its mode (training or evaluation)."""
    meta = case.meta
    options = {"prune_block": meta.get("prune_at", 3), **options}
    if "rescale_bias_min" in meta:
        options["rescale_min"] = meta["rescale_bias_min"]
    stage = STTS(meta["D"], meta["mlp_dim"], meta["heads"], **options)
    stage.scorer.load_state_dict(scorer_names(case.group("scorer")))
    return stage.train(meta.get("train", False))


def scorer_names(release: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the release under our parameter names."""
    ours = {f"patch_token_pooler.{theirs}.": f"pooling.{name}." for name, theirs in POOLING.items()}
    ours |= {f"mlp.w{number + 1}.": f"mlp.{number}." for number in range(3)}
    out = {}
    for name, tensor in release.items():
        [prefix] = [prefix for prefix in ours if name.startswith(prefix)]
        out[name.replace(prefix, ours[prefix])] = tensor
    return out


def video_tokens(case: Any, x_SND: Tensor, part: Part) -> VideoTokens:
    """The slots of one part, as a stage sees them."""
    side = round(case.meta["P"] ** 0.5)
    grid = Grid(part.num_frames, side, side)
    index_PW = case["window_index"]
    offset_T = torch.arange(part.num_frames)[:, None, None] * case.meta["N"]
    return VideoTokens(
        x_ND=x_SND[part.start : part.start + part.num_frames].flatten(0, 1),
        grid=grid,
        cell_G=torch.arange(grid.num_groups),
        group_GW=torch.where(index_PW < 0, -1, index_PW + offset_T).flatten(0, 1),
    )


def decide(case: Any, stage: STTS, x_SND: Tensor) -> list[tuple[Part, Kept]]:
    """Run the stage on the whole batch. The release scores every slot; ours by default sees videos only."""
    seen = [part for part in parts(case) if part.kind == "video" or stage.compat == "official"]
    tokens = [video_tokens(case, x_SND, part) for part in seen]
    videos = [video for video, part in zip(tokens, seen, strict=True) if part.kind == "video"]
    ratio = from_removed(case.meta["prune_ratio"])
    planned = plan([stage.site], ratio, [video.grid for video in videos], 4)[0]
    if stage.compat == "official":
        counts = case["num_to_prune"].tolist()
        release = [Budget(v.grid.num_groups - n, ratio) for v, n in zip(videos, counts, strict=True)]
        assert [b.num_kept for b in release] == [b.num_kept for b in planned], "our rule where the release is right"
        planned = release
    in_order = iter(planned)
    full = [Budget(video.grid.num_groups, 1.0) for video in tokens]
    budgets = [next(in_order) if part.kind == "video" else whole for part, whole in zip(seen, full, strict=True)]
    return list(zip(seen, stage(tokens, budgets), strict=True))


def keep_groups(case: Any, decided: Sequence[tuple[Part, Kept]]) -> Tensor:
    """bool (S, P): images whole, padding never."""
    keep_SP = torch.zeros(case.meta["B"] * case.meta["T"], case.meta["P"], dtype=torch.bool)
    kept = {part: kept for part, kept in decided}
    for part in parts(case):
        place = keep_SP[part.start : part.start + part.num_frames].view(-1)
        if part.kind == "video":
            place[kept[part].index_K] = True
        else:
            place[:] = part.kind == "image"
    return keep_SP


def patch_mask(case: Any, keep_SP: Tensor) -> Tensor:
    """bool (S, N) of patches in a kept group; windows lie side by side here."""
    keep_SN = torch.zeros(len(keep_SP), case.meta["N"], dtype=torch.bool)
    keep_SN[:, case["window_index"]] = keep_SP[:, :, None].expand(-1, -1, case["window_index"].shape[1])
    return keep_SN


def patch_bias(case: Any, decided: Sequence[tuple[Part, Kept]]) -> Tensor | None:
    """fp32 (S, N) key bias of all slots, None when the stage gave none."""
    bias_SN = torch.zeros(case.meta["B"] * case.meta["T"], case.meta["N"])
    given = [(part, kept.attention_bias_N) for part, kept in decided if kept.attention_bias_N is not None]
    for part, bias_N in given:
        slots = torch.arange(part.start, part.start + part.num_frames)
        bias_SN = bias_SN.index_copy(0, slots, bias_N.view(part.num_frames, -1))
    return bias_SN if given else None


class Host(nn.Module):
    """The tower of a case in stock SigLIP blocks, and its connector."""

    def __init__(self, case: Any) -> None:
        super().__init__()
        self.case, meta = case, case.meta
        weights = case.group("backbone")
        vit = "image_vit.transformer.resblocks."
        self.config = SiglipVisionConfig(
            hidden_size=meta["D"],
            intermediate_size=meta["mlp_dim"],
            num_attention_heads=meta["heads"],
            hidden_act="gelu_pytorch_tanh",
        )
        self.config._attn_implementation = "sdpa"
        attention.switch_on(self.config)
        self.blocks = nn.ModuleList(SiglipEncoderLayer(self.config) for _ in range(meta["layers"]))
        names = {
            "layer_norm1": "attention_norm",
            "layer_norm2": "ffn_norm",
            "mlp.fc1": "feed_forward.w1",
            "mlp.fc2": "feed_forward.w2",
            "self_attn.q_proj": "attention.wq",
            "self_attn.k_proj": "attention.wk",
            "self_attn.v_proj": "attention.wv",
            "self_attn.out_proj": "attention.wo",
        }
        for number, block in enumerate(self.blocks):
            block.load_state_dict(
                {
                    f"{ours}.{leaf}": weights[f"{vit}{number}.{theirs}.{leaf}"]
                    for ours, theirs in names.items()
                    for leaf in ("weight", "bias")
                }
            )
        self.pool = WindowPooling(meta["D"], meta["heads"], in_dim=2 * meta["D"])
        pool = {
            f"{o}.{leaf}": weights[f"image_pooling_2d.{t}.{leaf}"]
            for o, t in POOLING.items()
            for leaf in ("weight", "bias")
        }
        self.pool.load_state_dict(pool)
        self.weights = {name: tensor for name, tensor in weights.items() if not name.startswith(vit)}
        self.eval().requires_grad_(False)

    def embed(self) -> Tensor:
        """(S, N, D) input of block 0, from flattened pixel patches."""
        patches = self.case["patches"].flatten(0, 1)
        linear = [self.weights[f"image_vit.patch_embedding.{leaf}"] for leaf in ("weight", "bias")]
        return F.linear(patches, *linear) + self.weights["image_vit.positional_embedding"]

    def run(self, stage: STTS) -> tuple[dict[int, Tensor], list[tuple[Part, Kept]]]:
        """Hidden states (S, N, D) by block through our block loop, zeros where a patch is gone, and the decision."""
        seen: dict[int, Tensor] = {}
        decided: list[tuple[Part, Kept]] = []

        def recording(number: int, block: Callable[..., Tensor]) -> Callable[[Tensor, Any], Tensor]:
            def run(x: Tensor, mask: Any) -> Tensor:
                seen[number] = block(x, None) if mask is None else block(x[None], mask)[0]
                return seen[number]

            return run

        def choose(x_ND: Tensor) -> Drop | None:
            decided.extend(decide(self.case, stage, x_ND.view_as(x_SND)))
            bias_SN = patch_bias(self.case, decided)
            if bias_SN is None:
                return None
            keep_SN = patch_mask(self.case, keep_groups(self.case, decided))
            return Drop(keep_SN.flatten(), bias_SN.flatten())

        blocks = [recording(number, block) for number, block in enumerate(self.blocks)]
        x_SND = self.embed()
        given = TowerInput(x_SND.flatten(0, 1), (x_SND.shape[1],) * len(x_SND), batched=True)
        out = run_tower(given, blocks, sorted(self.case.meta["feature_layers"]), stage.site, choose)
        for number, x in seen.items():
            if x.shape != x_SND.shape:
                whole = len(x) == x_SND[..., 0].numel()
                rows = torch.arange(len(x)) if whole else out.row_S
                assert rows is not None
                seen[number] = torch.zeros_like(x_SND).flatten(0, 1).index_copy(0, rows, x).view_as(x_SND)
        return seen, decided

    def run_refilled(self, x_SND: Tensor, keep_SN: Tensor, first_block: int) -> dict[int, Tensor]:
        """Blocks from `first_block` on in the row layout of the release, refill included."""
        rows = reference_rows(keep_SN)
        x_RND, mask = pack(x_SND, rows.row_FN, rows.slot_FN, rows.num_rows), rows.mask()
        seen = {}
        for number in range(first_block, len(self.blocks)):
            x_RND = self.blocks[number](x_RND, mask)
            back_SND = x_RND[rows.row_FN.clamp_min(0), rows.slot_FN.clamp_min(0)]
            seen[number] = torch.where(keep_SN[..., None], back_SND, 0.0)  # refilled patches are context only
        return seen

    def connect(self, hidden: dict[int, Tensor], keep_SP: Tensor) -> Tensor:
        """(K, llm width): attention pooling of each kept window, then silu(w1 x) * w3 x through w2."""
        meta = self.case.meta
        x_SND = torch.cat([hidden[layer] for layer in meta["feature_layers"]], -1)
        index_BGW = self.case["connector_window_index"]  # into the patches of the row; -1 for padding
        offset_B = torch.arange(meta["B"])[:, None, None] * meta["T"] * meta["N"]
        index_GW = torch.where(index_BGW < 0, -1, index_BGW + offset_B).flatten(0, 1)
        pooled = self.pool(x_SND.flatten(0, 1), index_GW[keep_SP.flatten()])
        w1, w2, w3 = (self.weights[f"image_projector.w{number}.weight"] for number in (1, 2, 3))
        return F.linear(F.silu(F.linear(pooled, w1)) * F.linear(pooled, w3), w2)


def pack(x_SND: Tensor, row_SN: Tensor, slot_SN: Tensor, num_rows: int) -> Tensor:
    """(R, N, D) patches at their row and slot, zeros elsewhere."""
    present = row_SN >= 0
    packed = x_SND.new_zeros(num_rows, *x_SND.shape[1:])
    return packed.index_put((row_SN[present], slot_SN[present]), x_SND[present])
