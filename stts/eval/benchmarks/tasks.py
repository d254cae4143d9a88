"""Every task by name, and suites of them. Names are lmms-eval's where it has the task."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from stts.eval.benchmarks.base import Benchmark
from stts.eval.benchmarks.egoschema import EgoSchema
from stts.eval.benchmarks.eventhallusion import EventHallusion
from stts.eval.benchmarks.longvideobench import LongVideoBench, LongVideoBenchInterleaved
from stts.eval.benchmarks.meta_jsonl import LVBench, MotionBench
from stts.eval.benchmarks.mlvu import MLVU
from stts.eval.benchmarks.mvbench import FOLDERS, MVBench
from stts.eval.benchmarks.nextqa import NextQA
from stts.eval.benchmarks.perceptiontest import PerceptionTest
from stts.eval.benchmarks.plain import PlainJsonl
from stts.eval.benchmarks.tempcompass import Captioning, CaptionMatching, MultiChoice, YesNo
from stts.eval.benchmarks.tomato import Tomato
from stts.eval.benchmarks.vcgbench import VCGBench
from stts.eval.benchmarks.videoevalpro import VideoEvalPro
from stts.eval.benchmarks.videomme import VideoMME

_ALL: tuple[Benchmark, ...] = (
    VideoMME(name="videomme", expected_rows=2700),
    VideoMME(name="videomme_w_subtitle", subtitles=True, expected_rows=2700),
    VideoMME(name="videomme_long", only="long", expected_rows=900),
    MVBench(name="mvbench", expected_rows=4000),
    *(MVBench(name=f"mvbench_{task}", tasks=(task,), expected_rows=200) for task in FOLDERS),
    LongVideoBench(name="longvideobench_val_v", expected_rows=1337),
    LongVideoBenchInterleaved(name="longvideobench_val_i", expected_rows=1337),
    MLVU(name="mlvu_dev", expected_rows=2174),
    EgoSchema(name="egoschema_subset", expected_rows=500),
    EgoSchema(name="egoschema", folders=("MC", "GENERATION")),
    NextQA(name="nextqa_mc_test", expected_rows=8564),
    NextQA(name="nextqa_mc_val", tables=("val.csv",), expected_rows=4996),
    PerceptionTest(name="perceptiontest_val_mc"),
    PerceptionTest(name="perceptiontest_test_mc", table="mc_question/test-00000-of-00001.parquet"),
    MultiChoice(name="tempcompass_multi_choice", expected_rows=1580),
    YesNo(name="tempcompass_yes_no", expected_rows=2453),
    CaptionMatching(name="tempcompass_caption_matching", expected_rows=1503),
    Captioning(name="tempcompass_captioning", expected_rows=2004),
    EventHallusion(name="eventhallusion", expected_rows=409),
    Tomato(name="tomato", expected_rows=1484),
    MotionBench(name="motionbench_full"),
    LVBench(name="lvbench", expected_rows=1549),
    VideoEvalPro(name="videoevalpro_mcq", expected_rows=1289),
    VCGBench(name="videochatgpt_gen", folder="Generic"),
    VCGBench(name="videochatgpt_temporal", folder="Temporal"),
    VCGBench(name="videochatgpt_consistency", folder="Consistency"),
    PlainJsonl(name="jsonl"),
)
TASKS: Mapping[str, Benchmark] = MappingProxyType({task.name: task for task in _ALL})

_SHORT = (
    "mvbench", "tomato", "motionbench_full", "tempcompass_multi_choice", "perceptiontest_val_mc", "egoschema_subset",
    "nextqa_mc_test",
)  # fmt: skip
_LONG = (
    "videomme", "videomme_w_subtitle", "longvideobench_val_v", "mlvu_dev", "lvbench", "videoevalpro_mcq",
)  # fmt: skip
SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "molmo2_short": _SHORT,
        "molmo2_long": _LONG,
        "molmo2_13": (*_SHORT, *_LONG),
        "prune4": ("mvbench", "longvideobench_val_v", "mlvu_dev", "videomme"),
    }
)


def get_task(name: str) -> Benchmark:
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; known: {', '.join(TASKS)}; suites: {', '.join(SUITES)}")
    return TASKS[name]


def suite_score(suite: str, headlines: Mapping[str, float | None]) -> float | None:
    """Unweighted mean of the tasks' headlines; None if one is missing, never the mean of the rest."""
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown; known: {', '.join(SUITES)}")
    values = [value for task in SUITES[suite] if (value := headlines.get(task)) is not None]
    return sum(values) / len(values) if len(values) == len(SUITES[suite]) else None
