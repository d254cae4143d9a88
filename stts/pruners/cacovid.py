"""CaCoVID: a policy of one transformer layer before the LLM, taught by the reward of answers (arXiv 2602.01649).

Shape suffixes beside those of `stts.tokens`: V = videos, L = words and tokens of a prompt, H = heads, Q = samples, B =
samples of frames, J = groups of places of similar rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts.pruners import frames, ops
from stts.pruners.base import HostInfo, Newlines, Positions, Stage, check_counts, check_finite
from stts.pruners.density import density_peaks_of
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens

KEEP = 1
"""The class of the two that stands for a kept token."""


class CaCoVID(nn.Module):
    """Keep the tokens that a policy names important, frame by frame, and an even stride of the others.

    The policy reads the words before the video, the video, and with `attention="full"` the words behind it, through one
    decoder layer shaped like the LLM's; a small head on each token, and one on the mean of each frame, give the logits
    of leaving and keeping. With s their difference, T frames of P places, k tokens in all and half of them important:

        p = softmax(3 s_frame / max |s_frame|), clipped to [1/(2 T), 1.5/T];   n_t ~ p_t k/2;   best n_t of frame t by s

    arXiv 2602.01649; `compression_policy.py` of LivingFutureLab/CaCoVID, whose tensor names these are. The released
    weights go with `attention="causal"`: its pinned software computes that, so the question, which stands behind the
    video, does not reach them. "full" is what the paper means; it is refused in training, where the answer stands
    behind the question, and sees the answer in teacher-forced validation. The layer costs about one layer of dense
    prefill, which `flops` counts. A policy without released weights is random: its reinforcement loop is not here, only
    its samples and its loss (`policy_loss`); fine-tuning leaves it as it is.

    **Differs:** counts of frames by largest remainder between 1 and a cap; the release gives what is left to the frames
    with the fewest tokens, past the cap (compat="official"). Equal frame scores are shared out evenly (NaN there).
    Scores are ranked themselves, not their softmax, which ties in fp32. The third head of the release, which nothing
    uses, is left out."""

    paper: ClassVar[str] = "2602.01649"
    needs_time: ClassVar[str] = "it shares the budget among frames by their importance"
    site: Site = Site("pre_llm")
    signals: frozenset[Signal] = frozenset({"words"})
    newlines: Newlines = "all"
    positions: Positions = "original"

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        mlp: int,
        theta: float = 1e6,
        eps: float = 1e-6,
        attention: Literal["causal", "full"] = "causal",
        important_share: float = 0.5,
        spread: float = 1.5,
        compat: Literal["official"] | None = None,
    ) -> None:
        """dim, heads, kv_heads, mlp, theta, eps: as of a layer of the LLM. important_share: of the budget, chosen by
        score. spread: most tokens of a frame, over its equal share."""
        super().__init__()
        if attention not in ("causal", "full"):
            raise ValueError(f"attention={attention!r} is unknown; expected 'causal' or 'full'")
        if not 0 < important_share <= 1 or spread < 1:
            raise ValueError(f"important_share={important_share} must be in (0, 1] and spread={spread} at least 1")
        self.attention, self.compat = attention, compat
        self.important_share, self.spread = important_share, spread
        self.compression_policy = Policy(dim, heads, kv_heads, mlp, theta, eps)

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> CaCoVID:
        """Sized like a layer of this host's LLM."""
        sizes = {
            "heads": host.llm_heads, "kv_heads": host.llm_kv_heads, "mlp": host.llm_mlp, "theta": host.rope_theta,
            "eps": host.norm_eps,
        }  # fmt: skip
        return cls(host.llm_width, **{**sizes, **options})

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (self,)

    @property
    def count_known(self) -> bool:
        return self.compat is None

    def forward(self, videos: Sequence[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
        """One call of the policy for all videos of the batch."""
        if not videos:
            return []
        if self.attention == "full" and self.training and torch.is_grad_enabled():
            raise ValueError(
                'attention="full" reads the words behind the video, which hold the answer in training; fine-tune under '
                'attention="causal"'
            )
        check_finite(videos)
        check_counts(videos, budgets)
        for video in videos:
            ops.need_full_grid(video)
        with torch.no_grad():
            logits = self.logits(videos)
        row = []
        for (token_N2, frame_T2), video, budget in zip(logits, videos, budgets, strict=True):
            score_N = token_N2[:, KEEP] - token_N2[:, 1 - KEEP]
            score_T = frame_T2[:, KEEP] - frame_T2[:, 1 - KEEP]
            row.append(Kept(index_K=self.choose(score_N, score_T, video.grid, budget), scores_G=score_N))
        return row

    def logits(self, videos: Sequence[VideoTokens]) -> list[tuple[Tensor, Tensor]]:
        """Of every video: (N, 2) of its tokens and (T, 2) of its frames, fp32, for leaving and keeping."""
        rows, firsts = [], []
        for video in videos:
            words = ops.need(video.words, "words", video)
            behind = [words.behind_LD] if self.attention == "full" else []
            rows.append(torch.cat([x.to(video.x_ND.dtype) for x in (words.before_LD, video.x_ND, *behind)]))
            firsts.append(len(words.before_LD))
        grids = [video.grid for video in videos]
        policy: list[tuple[Tensor, Tensor]] = self.compression_policy(rows, firsts, grids, self.attention == "causal")
        return policy

    def choose(self, score_N: Tensor, score_T: Tensor, grid: Grid, budget: Budget) -> Tensor:
        """(K,) int64 kept cells, increasing."""
        total = budget.num_kept
        if self.compat == "official" and not budget.exact:
            total = max(1, int(budget.retention_ratio * grid.num_groups))
        counts = torch.tensor(self.frame_counts(score_T, grid, total, budget), device=score_N.device)
        important_K = frames.top_per_frame(score_N.view(grid.t, -1), counts)
        rest_N = torch.ones_like(score_N, dtype=torch.bool).index_fill_(0, important_K, False)
        left = total - len(important_K)
        rest_M = rest_N.nonzero()[:, 0]
        place_R = torch.linspace(0, len(rest_M) - 1, left, dtype=torch.float64, device=score_N.device).round().long()
        return torch.cat([important_K, rest_M[place_R]]).sort().values

    def frame_counts(self, score_T: Tensor, grid: Grid, total: int, budget: Budget) -> list[int]:
        """Important tokens of every frame; one host synchronisation."""
        share, spread = self.important_share, self.spread
        largest = score_T.abs().amax().clamp_min(1e-12)
        p_T = (3 * score_T / largest).softmax(0).clamp(1 / (2 * grid.t), spread / grid.t)
        p_T = p_T / p_T.sum()
        num_by_score = int(share * total + 1e-9)
        if self.compat != "official" or budget.exact:
            cap = min(grid.per_frame, math.ceil(share * spread * total / grid.t))
            shares: list[int] = frames.share_out(p_T, num_by_score, cap).tolist()
            return shares
        ratio = budget.retention_ratio
        size = share * ratio * grid.num_groups
        cap = int(share * grid.per_frame * spread * ratio)
        counts: list[int] = (p_T * round(size)).round().clamp(1, max(1, cap)).long().tolist()
        rest = int(size + 1e-9) - sum(counts)
        while rest:
            frame = counts.index(max(counts) if rest < 0 else min(counts))
            counts[frame] += 1 if rest > 0 else -1
            rest = int(size + 1e-9) - sum(counts)
        return counts

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """The layer on the video alone, and the heads on every token; words are left out as few."""
        return self.compression_policy.flops(grid.num_groups, grid.t)


class Policy(nn.Module):
    """A decoder layer and two heads; its tensors have the names of the release."""

    def __init__(self, dim: int, heads: int, kv_heads: int, mlp: int, theta: float, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(dim, heads, kv_heads, mlp, theta, eps)])
        self.layernorm = nn.RMSNorm(dim, eps)
        self.token_compress, self.frame_compress = _head(dim), _head(dim)

    def forward(
        self, rows: Sequence[Tensor], firsts: Sequence[int], grids: Sequence[Grid], causal: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """rows: embeddings of every prompt, (L, D); firsts: where its video begins. See `CaCoVID.logits`."""
        dtype = self.layernorm.weight.dtype
        x_VLD = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(dtype)
        length_V = torch.tensor([len(row) for row in rows], device=x_VLD.device)
        real_VL = torch.arange(x_VLD.shape[1], device=x_VLD.device) < length_V[:, None]
        h_VLD = self.layers[0](x_VLD, None if causal else real_VL)
        tokens = [h_LD[first : first + grid.num_groups] for h_LD, first, grid in zip(h_VLD, firsts, grids, strict=True)]
        frames = [x_ND.unflatten(0, (grid.t, -1)).mean(1) for x_ND, grid in zip(tokens, grids, strict=True)]
        token_N2 = self.token_compress(self.layernorm(torch.cat(tokens))).float()
        frame_T2 = self.frame_compress(self.layernorm(torch.cat(frames))).float()
        parts = token_N2.split([grid.num_groups for grid in grids]), frame_T2.split([grid.t for grid in grids])
        return list(zip(*parts, strict=True))

    def flops(self, num_tokens: int, num_frames: int) -> int:
        """1 multiply-add = 2."""
        dim = self.layernorm.weight.shape[0]
        head = sum(layer.weight.numel() for layer in self.token_compress if isinstance(layer, nn.Linear))
        layer = sum(p.numel() for p in self.layers.parameters() if p.ndim > 1)
        return 2 * num_tokens * (layer + head) + 4 * num_tokens**2 * dim + 2 * num_frames * head


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): grouped queries, rotary positions from 0, SiLU-gated MLP."""

    def __init__(self, dim: int, heads: int, kv_heads: int, mlp: int, theta: float, eps: float) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        width = dim // heads
        self.width, self.theta = width, theta
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(dim, heads * width),
                "k_proj": nn.Linear(dim, kv_heads * width),
                "v_proj": nn.Linear(dim, kv_heads * width),
                "o_proj": nn.Linear(heads * width, dim, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(dim, mlp, bias=False),
                "up_proj": nn.Linear(dim, mlp, bias=False),
                "down_proj": nn.Linear(mlp, dim, bias=False),
            }
        )

    def forward(self, x_VLD: Tensor, real_VL: Tensor | None) -> Tensor:
        """real_VL: bool, what is no padding, and attention both ways; None: causal."""
        y_VLD = self.input_layernorm(x_VLD)
        q, k, v = (
            self.self_attn[name](y_VLD).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mask = None if real_VL is None else real_VL[:, None, None]
        out_VHLE = F.scaled_dot_product_attention(
            self._turned(q), self._turned(k), v, mask, is_causal=real_VL is None, enable_gqa=True
        )
        x_VLD = x_VLD + self.self_attn["o_proj"](out_VHLE.transpose(1, 2).flatten(2))
        y_VLD = self.post_attention_layernorm(x_VLD)
        gated_VLM = F.silu(self.mlp["gate_proj"](y_VLD)) * self.mlp["up_proj"](y_VLD)
        out_VLD: Tensor = x_VLD + self.mlp["down_proj"](gated_VLM)
        return out_VLD

    def _turned(self, x_VHLE: Tensor) -> Tensor:
        """Rotary embedding, half-split."""
        half = self.width // 2
        frequency = self.theta ** (-torch.arange(half, device=x_VHLE.device, dtype=torch.float32) / max(half, 1))
        angle = torch.arange(x_VHLE.shape[2], device=x_VHLE.device)[:, None] * frequency
        cos, sin = angle.cos().to(x_VHLE.dtype), angle.sin().to(x_VHLE.dtype)
        first, second = x_VHLE[..., :half], x_VHLE[..., half : 2 * half]
        turned = [first * cos - second * sin, second * cos + first * sin, x_VHLE[..., 2 * half :]]
        return torch.cat(turned, -1)


def _head(dim: int) -> nn.Sequential:
    """D -> D/2 -> D/4 -> D/8 -> D/16 -> 2, SiLU between."""
    sizes = [dim, *(max(1, dim // 2**step) for step in (1, 2, 3, 4)), 2]
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


# --- its samples: what the loss compares ---------------------------------------------------------------------------


def token_samples(
    token_N2: Tensor, grid: Grid, rate: float, number: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """bool (number, N): tokens that each sample keeps, round(rate P) of the P places of every frame.

    The first holds the best of each frame. The others draw, frame by frame, one of the groups of similar rank
    (`group_odds`) and inside it without replacement, where no odds are above twice or below half of the mean.
    token_N2: logits at the first step on this video. arXiv 2602.01649, `sample_token` of `compression_policy.py`."""
    odds_TP, order_TP, group_P, odds_TJ = group_odds(token_N2, grid, rate)
    size, num_kept = grid.per_frame // odds_TJ.shape[1], max(1, round(rate * grid.per_frame))
    group_TQ = torch.multinomial(odds_TJ, number, replacement=True, generator=generator)
    inside_TQP = group_P == group_TQ[..., None]
    odds_TQP = (odds_TP.gather(1, order_TP)[:, None] * inside_TQP).clamp_min(1e-12)
    odds_TQP = (odds_TQP / odds_TQP.sum(-1, keepdim=True)).clamp(0.5 / size, 2 / size) * inside_TQP
    rank_TQK = torch.multinomial(odds_TQP.flatten(0, 1), num_kept, generator=generator).view(grid.t, number, num_kept)
    rank_TQK[:, 0] = torch.arange(num_kept, device=rank_TQK.device)
    place_TQK = order_TP[:, None].expand(-1, number, -1).gather(2, rank_TQK)
    kept_TQP = torch.zeros_like(inside_TQP).scatter_(2, place_TQK, True)
    return kept_TQP.transpose(0, 1).flatten(1)


def group_odds(token_N2: Tensor, grid: Grid, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Odds of the places of a frame (T, P); places by falling odds (T, P); the group of each rank (P,); odds of groups.

    There are G = int(1 / rate / 2) groups (fewer where they would not hold a sample), the first ones longer by one
    where P is no multiple; the odds of a group are the sum of its places', capped at 2/G (between 0.1 and 0.9)."""
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} is not in (0, 1]; give the share of the places that a sample keeps")
    num_kept = max(1, round(rate * grid.per_frame))
    num_groups = max(1, min(int(1 / rate / 2), grid.per_frame // num_kept))
    odds_TP = (token_N2[:, KEEP] - token_N2[:, 1 - KEEP]).float().view(grid.t, -1).softmax(1)
    order_TP = odds_TP.sort(dim=1, descending=True, stable=True).indices
    length, longer = divmod(grid.per_frame, num_groups)
    sizes = torch.tensor([length + (group < longer) for group in range(num_groups)], device=odds_TP.device)
    group_P = torch.arange(num_groups, device=odds_TP.device).repeat_interleave(sizes)
    odds_TJ = odds_TP.new_zeros(grid.t, num_groups).index_add_(1, group_P, odds_TP.gather(1, order_TP))
    most = max(min(2 / num_groups, 0.9), 0.1) if num_groups > 1 else 1.0
    return odds_TP, order_TP, group_P, capped(odds_TJ, most)


def frame_samples(
    frame_T2: Tensor, number: int, *, share: float = 0.25, generator: torch.Generator | None = None,
    compat: Literal["official"] | None = None,
) -> Tensor:  # fmt: skip
    """bool (number, T): frames that each sample keeps, ceil(share T); the first holds the best.

    Inside them the tokens are the `centres` of the frames kept. **Differs:** `frame_odds`."""
    odds_BT = frame_odds(frame_T2, number, compat)
    num_kept = math.ceil(share * odds_BT.shape[1])
    frame_BK = torch.multinomial(odds_BT, num_kept, generator=generator)
    frame_BK[0] = ops.top(frame_T2[:, KEEP] - frame_T2[:, 1 - KEEP], num_kept)
    return torch.zeros_like(odds_BT, dtype=torch.bool).scatter_(1, frame_BK, True)


def frame_odds(frame_T2: Tensor, number: int, compat: Literal["official"] | None = None) -> Tensor:
    """(number, T) odds of frames, capped at 3/T, a row for every sample.

    **Differs:** the release takes floor and cap over all rows together, so no frame is capped and none of few samples
    has other odds than the rest (compat="official"); here a row is capped alone."""
    odds_BT = (frame_T2[:, KEEP] - frame_T2[:, 1 - KEEP]).float().softmax(0).expand(number, -1)
    if compat == "official":
        odds_BT = odds_BT.clamp_min(1 / number**2)
        return odds_BT / odds_BT.sum()
    return capped(odds_BT, 3 / odds_BT.shape[1])


def capped(odds_BM: Tensor, most: float) -> Tensor:
    """Odds of each row: at least 1/M^2, scaled to sum to 1, and at most `most`; the others take the excess."""
    num = odds_BM.shape[1]
    odds_BM = odds_BM.clamp_min(1 / num**2)
    odds_BM, full_BM = odds_BM / odds_BM.sum(1, keepdim=True), torch.zeros_like(odds_BM, dtype=torch.bool)
    if most * num <= 1:
        return torch.full_like(odds_BM, 1 / num)
    for _ in range(math.ceil(1 / most)):  # each time at least one more is full, and 1 / most are the whole
        full_BM = full_BM | (odds_BM > most)
        free_BM = odds_BM.masked_fill(full_BM, 0)
        rest_B1 = 1 - most * full_BM.sum(1, keepdim=True)
        odds_BM = torch.where(full_BM, most, free_BM * rest_B1 / free_BM.sum(1, keepdim=True).clamp_min(1e-12))
    return odds_BM


def centres(x_BND: Tensor, num_kept: int) -> Tensor:
    """bool (B, N): the density peaks of points, as a sample by content keeps of each frame, blind to the policy."""
    score_BN = density_peaks_of(x_BND / x_BND.shape[-1] ** 0.5, 4, count_self=True)
    return torch.zeros_like(score_BN, dtype=torch.bool).scatter_(1, ops.top(score_BN, num_kept), True)


# --- its loss ------------------------------------------------------------------------------------------------------


def advantages(reward_Q: Tensor) -> Tensor:
    """(S,) reward over its mean and spread: (R - mean) / (std + 1e-4), std unbiased; token and frame samples apart."""
    return (reward_Q - reward_Q.mean()) / (reward_Q.std() + 1e-4)


def policy_loss(
    token_N2: Tensor, frame_T2: Tensor, old_token_N2: Tensor, old_frame_T2: Tensor, sampled_QN: Tensor,
    frames_BT: Tensor, advantage_Q: Tensor, advantage_B: Tensor, *, low: float = 0.2, high: float = 0.28,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The losses of tokens and of frames, which are added: a clipped policy gradient.

        r = exp(log pi(m) - log pi_old(m)),   l = -min(r A, clip(r, 1 - low, 1 + high) A)
        tokens: mean over samples of sum(w l) / (sum w + 1e-7),   w = 1 - mu where kept, mu elsewhere, mu = share kept
        frames: the plain mean of l

    token_N2, frame_T2: logits now; old_*: log probabilities at the first step on this video; sampled_QN, frames_BT:
    bool, what each sample kept; all samples of this video so far take part. arXiv 2602.01649, `compute_loss` of
    `CPOTrainer`; no penalty on the distance from the old policy, as released."""

    def per_choice(logit_M2: Tensor, old_M2: Tensor, kept_QM: Tensor, advantage_Q: Tensor) -> Tensor:
        now_M2 = logit_M2.log_softmax(-1)
        change_M2 = now_M2 - old_M2
        ratio_QM = torch.where(kept_QM, change_M2[:, KEEP], change_M2[:, 1 - KEEP]).exp()
        clipped_QM = ratio_QM.clamp(1 - low, 1 + high)
        return -torch.minimum(ratio_QM * advantage_Q[:, None], clipped_QM * advantage_Q[:, None])

    loss_QN = per_choice(token_N2, old_token_N2, sampled_QN, advantage_Q)
    share_Q1 = sampled_QN.float().mean(1, keepdim=True)
    weight_QN = torch.where(sampled_QN, 1 - share_Q1, share_Q1)
    token_loss = ((weight_QN * loss_QN).sum(1) / (weight_QN.sum(1) + 1e-7)).mean()
    return token_loss, per_choice(frame_T2, old_frame_T2, frames_BT, advantage_B).mean()
