"""TempCompass (arXiv:2403.00476): does a model see how things move? Four tasks on 410 short videos.

Multiple choice, yes or no, caption matching and captioning; options stand inside the question, and the prompt keeps
them as they are. The public scorers ask a chat model about answers that no rule matches; here those are wrong and
counted. Captioning has no other way: without a judge its score is None."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stts.eval.benchmarks.base import LETTER_CUE, YES_NO_CUE, Benchmark, Question, check_uids
from stts.eval.benchmarks.files import Row, find_video, rows_of
from stts.eval.benchmarks.options import checked_letter, place_of, split_inline
from stts.eval.benchmarks.scores import Compat, Scored, Scores, common_metrics, grouped
from stts.metrics import extract

Judge = Callable[[str], bool]
"""Says whether the answer in a prompt is right; see `Captioning`."""
_BEST = "Reply with the best option only."


@dataclass(frozen=True, kw_only=True)
class TempCompass(Benchmark):
    folder: ClassVar[str]

    title = "TempCompass"
    layouts = ("{multi-choice, yes_no, caption_matching, captioning}/test-*.parquet + videos/{video_id}.mp4",)
    primary = "dim"
    their_metric = ("avg_accuracy", 100)

    def rows(self, root: Path) -> Iterable[Row]:
        return rows_of(root, f"{self.folder}/test-00000-of-00001.parquet")

    def read(self, row: Row, doc_id: int) -> Question:
        options, answer = self.options_of(row)
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=f"{row.text('video_id')}/{row.number}",
            video=find_video(row.root, ("videos",), row.text("video_id")),
            question=row.text("question"),
            options=options,
            answer=answer,
            group={"dim": row.text("dim")},
            doc=row.values,
        )

    def options_of(self, row: Row) -> tuple[tuple[str, ...], str]:
        """The options that the question holds, and the answer."""
        return (), row.text("answer")


class MultiChoice(TempCompass):
    folder = "multi-choice"
    wording = f"{{question}}\n{LETTER_CUE}"
    compat: ClassVar = {"official": Compat(extract.marked)}

    def options_of(self, row: Row) -> tuple[tuple[str, ...], str]:
        _, options = split_inline(row.text("question"))
        return options, checked_letter(row.text("answer"), options)


class YesNo(TempCompass):
    folder = "yes_no"
    wording = f"{{question}}\n{YES_NO_CUE}"
    compat: ClassVar = {"official": Compat(extract.starts_yes_no)}

    def options_of(self, row: Row) -> tuple[tuple[str, ...], str]:
        answer = extract.yes_no(row.text("answer"))
        if not answer:
            raise ValueError(f"answer {row.text('answer')!r} is neither yes nor no")
        return (), answer

    def parse(self, text: str, question: Question) -> str:
        return extract.yes_no(text)


class CaptionMatching(TempCompass):
    """Options are whole lines here, "Caption A: ...", because an answer may be any part of one."""

    folder = "caption_matching"
    wording = f"{{question}}\n{_BEST}"
    compat: ClassVar = {"official": Compat(extract.exact_caption)}

    def options_of(self, row: Row) -> tuple[tuple[str, ...], str]:
        lines = tuple(line.strip() for line in row.text("question").split("\n")[1:] if ": " in line)
        answer = extract.caption(row.text("answer"), lines)
        if not answer:
            raise ValueError(f"answer {row.text('answer')!r} is none of the options {list(lines)}")
        return lines, answer

    def parse(self, text: str, question: Question) -> str:
        return extract.caption(text, question.options)


class Captioning(TempCompass):
    """A description is right when a judge, reading it alone, would choose the right option of a question."""

    folder = "captioning"
    wording = "{question}"
    max_new_tokens = 1024
    needs_judge = True

    def options_of(self, row: Row) -> tuple[tuple[str, ...], str]:
        _, options = split_inline(row.text("mc_question"))
        return options, checked_letter(row.text("mc_answer"), options)

    def judge_prompt(self, question: Question, text: str) -> str:
        assert question.answer is not None
        right = question.options[place_of(question.answer, question.options)]
        return (
            f"Description of a video:\n{text}\n\nQuestion about the same video:\n{question.doc['mc_question']}\n\n"
            f"Does the description alone lead to the answer {question.answer}. {right}? {YES_NO_CUE}"
        )

    def score(
        self,
        questions: Sequence[Question],
        predictions: Mapping[str, str],
        scoring: str = "strict",
        judge: Judge | None = None,
    ) -> Scores:
        check_uids(questions, predictions)
        if judge is None:
            return Scores(self.name, "no judge", None, {"acc": None, "n": len(questions)}, {}, ())
        scored = []
        for question in questions:
            right = judge(self.judge_prompt(question, predictions[question.uid]))
            dims = {"dim": (str(question.group["dim"]),)}
            scored.append(Scored(question.uid, str(question.video), predictions[question.uid], right, dims))
        metrics = common_metrics(scored, None)
        return Scores(self.name, "judge", metrics["acc"], metrics, grouped(scored), tuple(scored))


def overall(scores: Sequence[Scores]) -> float | None:
    """TempCompass's overall number: all questions of the tasks that were run together."""
    scored = [item for task in scores for item in task.scored]
    return sum(item.correct for item in scored) / len(scored) if scored else None
