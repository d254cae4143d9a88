"""`stts app`: a page on this machine where a clip is asked about, with every token and under two methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from stts.eval.answering.method import every_pruner
from stts.models.checkpoints.chat import Asked, Piece
from stts.models.checkpoints.load import as_recorded, load_vlm
from stts.report.one_clip import ask_all, make_prunings, times_of

SMALL_VLM = Path(__file__).parents[1] / "assets" / "shapes_vlm"
_HEAD = ["method", "answer", "tokens", "first ms", "all ms"]


class Demo:
    """The model behind the page. A clip and a question stay decoded, and answered densely, until another comes."""

    def __init__(self, model: str, num_frames: int | None) -> None:
        self.model, self.names = model, every_pruner(model)
        self._recorded = as_recorded(
            model, num_frames=num_frames, sampler=None, max_fps=None, exact=None, positions=None
        )
        self._vlm, self._processor = load_vlm(model)
        self._vlm.to("cuda" if torch.cuda.is_available() else "cpu")
        self._last: tuple[tuple[str, str], Asked] | None = None

    def ask(
        self, video: str | None, question: str, ratio: float, first: str, second: str
    ) -> tuple[list[list[str]], dict[str, list[int]]]:
        """A row per answer, dense first, under `_HEAD`; and by method the tokens kept of every frame.

        ValueError: no clip or question, a clip that cannot be read, a method that cannot be run at this ratio."""
        if not video or not question.strip():
            raise ValueError("choose a clip and write a question")
        asked_for = (video, question)
        like = self._last[1] if self._last is not None and self._last[0] == asked_for else None
        names = list(dict.fromkeys([first, second]))
        prunings, reasons = make_prunings(self._vlm, self.model, names, [ratio], self._recorded)
        if reasons:
            raise ValueError(reasons[0])
        views = ask_all(prunings, self._processor, self._recorded, Piece("video", Path(video)), question, like=like)
        one = views[0].asked
        self._last = asked_for, one
        rows = [["dense", one.dense.text.strip(), str(one.num_tokens[0]), *times_of(one, dense=True)]]
        kept: dict[str, list[int]] = {}
        for view in views:
            asked = view.asked
            rows.append([asked.method, view.said, str(asked.num_tokens[1]), *times_of(asked, dense=False)])
            kept[asked.method] = torch.bincount(view.index_K // view.grid.per_frame, minlength=view.grid.t).tolist()
        return rows, kept


def draw_kept(kept: dict[str, list[int]]) -> Figure:
    """Tokens kept of every frame, the methods side by side."""
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(kept)
    for number, (method, counts) in enumerate(kept.items()):
        axes.bar([frame + number * width for frame in range(len(counts))], counts, width, align="edge", label=method)
    axes.set_xlabel("frame")
    axes.set_ylabel("tokens kept of it")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


def make_page(demo: Demo, video: Path | None = None, question: str = "") -> Any:
    """The page as a `gradio.Blocks`."""
    import gradio

    def answer(*given: Any) -> tuple[list[list[str]], Figure]:
        try:
            rows, kept = demo.ask(*given)
        except ValueError as error:
            raise gradio.Error(str(error)) from error
        return rows, draw_kept(kept)

    first, second = (name if name in demo.names else demo.names[0] for name in ("tango", "visionzip"))
    with gradio.Blocks(title="stts", analytics_enabled=False) as page:
        gradio.Markdown(f"### One clip, one question, fewer tokens\nModel: `{Path(demo.model).name}`")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                clip = gradio.Video(None if video is None else str(video), label="clip", sources=["upload"], height=300)
                text = gradio.Textbox(question, label="question")
                ratio = gradio.Slider(0.05, 0.95, 0.25, step=0.05, label="fraction of visual tokens kept")
                with gradio.Row():
                    methods = [
                        gradio.Dropdown(list(demo.names), value=name, label=label, min_width=140)
                        for name, label in ((first, "method"), (second, "beside it"))
                    ]
                button = gradio.Button("Ask", variant="primary")
            with gradio.Column(scale=3, min_width=320):
                table = gradio.Dataframe(headers=_HEAD, label="answers", interactive=False, wrap=True)
                plot = gradio.Plot(show_label=False)
        given, shown = [clip, text, ratio, *methods], [table, plot]
        for event in (button.click, text.submit, ratio.release):
            event(
                answer, given, shown, concurrency_limit=1, concurrency_id="model"
            )  # one model, one question at a time
    return page


def app(
    *,
    model: str | None = None,
    video: Path | None = None,
    question: str | None = None,
    num_frames: int | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> str:
    """Open a page on this machine: upload a clip, ask, drag the fraction kept, and compare two methods.

    Args:
        model: model folder or hub id; null: the small VLM that comes with this package.
        video: a clip to begin with.
        question: a question to begin with.
        num_frames: frames, at most; null: as the model was trained, else 16.
        host: address to listen at; 0.0.0.0 lets other machines in, and nobody is asked for a password.
        port: of the page.
    """
    import gradio  # an extra: `stts.cli` looks for it before it imports this file

    page = make_page(Demo(model or str(SMALL_VLM), num_frames), video, question or "")
    page.launch(server_name=host, server_port=port, share=False, theme=gradio.themes.Default(font=["system-ui"]))
    return "closed"
