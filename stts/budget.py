"""The only place where a ratio becomes a count.

Ratios are read as decimals: `int(10 * (1 - 0.9))` is 0 in floating point, because 1 - 0.9 is a little under 0.1, while
a user who removes a tenth of ten groups means one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Decimal

from stts.tokens import Budget, Grid, Site


def check_ratio(retention_ratio: float) -> Decimal:
    """The ratio as the decimal the user wrote; ValueError outside (0, 1]."""
    if isinstance(retention_ratio, bool) or not isinstance(retention_ratio, (int, float)):
        raise ValueError(f"retention_ratio={retention_ratio!r} must be a number in (0, 1]")
    if not 0 < retention_ratio <= 1:
        raise ValueError(
            f"retention_ratio={retention_ratio} must be in (0, 1]: it is the fraction kept; to remove 90% write 0.1"
        )
    return Decimal(str(retention_ratio))


def from_removed(removed: float) -> float:
    """Fraction kept for a fraction removed (`topk`/r of arXiv:2603.18004), exact in decimals: 0.9 gives 0.1."""
    if not 0 <= removed < 1:
        raise ValueError(f"removed={removed} must be in [0, 1): the fraction of tokens that is pruned away")
    return float(1 - Decimal(str(removed)))


def plan(
    sites: Sequence[Site],
    retention_ratio: float,
    grids: Sequence[Grid],
    num_llm_layers: int,
    *,
    exact: bool = True,
) -> list[list[Budget]]:
    """Counts for every stage and video so that the whole pruner costs `retention_ratio` (equivalent retention).

    Equivalent retention = visual tokens summed over LLM layers / dense sum (efficiency accounting after Tango,
    arXiv:2604.09547). Sites before the LLM shorten every layer; an `llm` site at layer K only layers K and later.
    With llm sites of fixed `share` the part before the LLM is solved: r_pre = min(1, L r / (sum of layer shares)); llm
    sites with `share=None` are solved for one common share; with a `floor`, the deepest of them fall away (share 1)
    until at least that much is left behind the last, or one site remains. Sites that close (`Site.closes`) are planned
    as if the ratio were met before them; only the last of them, and stages behind it, get an exact budget, and `close`
    gives each the count that follows from what there was until then.

    * `vit`: num_kept = max(P, N - trunc(N * removed)), P groups of one frame: the first frame is always kept, which
      for very small ratios lifts the count (never raises; `retention_measured` shows it).
    * `pre_llm`: max(1, round(N * ratio)), halves to even. Several sites before the LLM: the first takes the whole
      ratio and later ones see and keep what is left.
    * `llm`: max(1, round(present * share)).

    Returns budgets[stage][video]. Raises ValueError for a ratio that no video can reach, with the lowest reachable one.
    """
    ratio = check_ratio(retention_ratio)
    first, shares = _solve(sites, ratio, num_llm_layers)
    budgets: list[list[Budget]] = []
    present = [grid.num_groups for grid in grids]
    solved = False
    exact_from = max((number for number, site in enumerate(sites) if site.closes), default=0)
    for order, (site, share) in enumerate(zip(sites, shares, strict=True)):
        row = []
        for video, grid in enumerate(grids):
            kept = _count(
                site, share if site.kind == "llm" else (Decimal(1) if solved else first), present[video], grid
            )
            own_ratio = float(ratio if site.closes else share if site.kind == "llm" else (1 if solved else first))
            row.append(Budget(kept, own_ratio, exact and order >= exact_from))
            present[video] = kept
        solved = solved or site.kind != "llm"
        budgets.append(row)
    return budgets


def adjust(budget: Budget, num_present: int) -> Budget:
    """The budget of a later stage where an earlier one kept another number of groups than was planned."""
    if not budget.exact:
        return replace(budget, num_kept=_rounded(Decimal(str(budget.retention_ratio)), num_present))
    return replace(budget, num_kept=min(budget.num_kept, num_present))


def close(budget: Budget, seen: Sequence[int], num_groups: int, num_layers: int, num_present: int) -> Budget:
    """The budget of a stage at a site that closes: what, kept to the end, gives the ratio meaned over the layers.

    seen: groups in every LLM layer before the site; num_groups: of the video. All that is present where less than one
    group too many would remain; at least one group, where the layers before have used up the ratio."""
    total = Decimal(str(budget.retention_ratio)) * num_groups * num_layers - sum(seen)
    left = total / (num_layers - len(seen))
    count = num_present if left > num_present - 1 else max(1, int(left.quantize(Decimal(1), rounding=ROUND_HALF_EVEN)))
    return replace(budget, num_kept=count)


def _solve(sites: Sequence[Site], ratio: Decimal, num_layers: int) -> tuple[Decimal, list[Decimal]]:
    """Ratio before the LLM, and the share of every site (1 where it is not an llm site)."""
    for site in sites:
        if site.kind == "llm" and not 0 < (site.layer or 0) < num_layers:
            raise ValueError(f"llm site at layer {site.layer} is outside [1, {num_layers - 1}] of this LLM; lower it")
    llm = sorted((site for site in sites if site.kind == "llm"), key=lambda site: site.layer or 0)
    has_pre = any(site.kind != "llm" for site in sites)
    if not llm:
        return ratio, [Decimal(1)] * len(sites)

    def cost(common: Decimal, free: list[Site]) -> Decimal:  # mean share per layer if nothing goes before the LLM
        total, here, last = Decimal(0), Decimal(1), 0
        for site in llm:
            total += here * ((site.layer or 0) - last)
            here *= common if site in free else Decimal(1) if site.share is None else Decimal(str(site.share))
            last = site.layer or 0
        return (total + here * (num_layers - last)) / num_layers

    free = [site for site in llm if site.share is None]
    common = Decimal(1)
    while free:
        lowest = cost(Decimal(0), free)
        if ratio <= lowest and ratio < 1:
            raise ValueError(
                f"retention_ratio={ratio} cannot be reached by a cut at LLM layer {llm[0].layer} of {num_layers}: "
                f"the layers before it see every token; the lowest reachable value is just above {lowest:.4f}"
            )
        low, high = Decimal(0), Decimal(1)
        for _ in range(60):  # bisection; cost grows with the common share
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle, free) < ratio else (low, middle)
        common = high
        floor = max(Decimal(str(site.floor)) for site in free)
        if len(free) == 1 or common ** len(free) >= floor:
            break
        free.pop()  # the deepest
    shares = [
        common if site in free else Decimal(1) if site.share is None else Decimal(str(site.share)) for site in sites
    ]
    first = min(Decimal(1), ratio / cost(common, free))
    if not has_pre and not free and abs(first - 1) > Decimal("1e-9"):
        raise ValueError(
            f"retention_ratio={ratio} differs from the {cost(common, free):.4f} that the fixed shares give and no "
            "stage before the LLM can make up for it; use that value or add a pre_llm stage"
        )
    return first, shares


def _count(site: Site, ratio: Decimal, present: int, grid: Grid) -> int:
    if site.kind == "vit":
        removed = int(present * (1 - ratio))  # truncation, as the STTS reference does
        return min(present, max(grid.per_frame, present - removed))
    return _rounded(ratio, present)


def _rounded(ratio: Decimal, present: int) -> int:
    return min(present, max(1, int((present * ratio).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))))
