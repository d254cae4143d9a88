"""`stts app`: what it answers, and the page in a real browser, from an uploaded clip to a dragged ratio."""

from __future__ import annotations

import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from stts.models.checkpoints.hub import PrunedVLM
from stts.report.app import SMALL_VLM, Demo, make_page
from tests.report.browser import Page, find_browser

QUESTION = "which colour flashed ?"


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(str(SMALL_VLM), None)


@pytest.fixture(scope="module")
def clip(clips: Path) -> str:
    return str(next((clips / "test").glob("*.mp4")))


def test_answers_are_those_of_ask(demo: Demo, clip: str) -> None:
    rows, kept = demo.ask(clip, QUESTION, 0.25, "tango", "fastv")
    alone = PrunedVLM.from_pretrained(SMALL_VLM, "tango", retention_ratio=0.25).ask(clip, QUESTION)
    answers = {name: (said, tokens) for name, said, tokens, *_ in rows}
    assert list(answers) == ["dense", "tango 0.25", "fastv 0.25"]
    assert answers["dense"] == (alone.dense.text.strip(), "144")
    assert answers["tango 0.25"] == (alone.pruned.text.strip(), "36")
    assert sum(kept["tango 0.25"]) == 36 and len(kept["fastv 0.25"]) == 16
    again, _ = demo.ask(clip, QUESTION, 0.5, "tango", "tango")
    assert again[0] == rows[0], "the dense answer to the same question is not made again"
    assert again[1][2] == "72" and len(again) == 2


def test_what_cannot_be_asked_is_said(demo: Demo, clip: str) -> None:
    with pytest.raises(ValueError, match="choose a clip and write a question"):
        demo.ask(None, QUESTION, 0.25, "tango", "fastv")
    with pytest.raises(ValueError, match=r"fastv 0\.05 was not run"):
        demo.ask(clip, QUESTION, 0.05, "tango", "fastv")


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_the_extra_is_named_before_anything_is_imported() -> None:
    code = "import sys; from stts.cli import main; n = main(['app']); assert 'torch' not in sys.modules; sys.exit(n)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "stts app needs gradio, which is not installed: pip install 'stts-video[app]'" in ended.stderr


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
@pytest.mark.skipif(find_browser() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_clip_is_uploaded_asked_and_asked_at_another_ratio(demo: Demo, clip: str, width: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = make_page(demo, question=QUESTION)
    app.launch(server_port=port, prevent_thread_lock=True, quiet=True)
    try:
        with Page(f"http://127.0.0.1:{port}", width=width) as page:
            ask = "[...document.querySelectorAll('button')].find(one => one.innerText.trim() == 'Ask')"
            page.wait(f"!!({ask}) && !!document.querySelector('input[type=file]')", 40)
            root = page.send("DOM.getDocument")["root"]["nodeId"]
            field = page.send("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
            page.send("DOM.setFileInputFiles", nodeId=field, files=[clip])
            page.wait("!!document.querySelector('video')", 40)
            page.js(f"{ask}.click()")
            page.wait("document.body.innerText.includes('visionzip 0.25')", 60)
            page.js("document.querySelector('input[type=range]').focus()")
            page.press("ArrowRight")
            page.js(
                "document.querySelector('input[type=range]').dispatchEvent(new Event('pointerup', {bubbles: true}))"
            )
            page.wait("document.body.innerText.includes('visionzip 0.3')", 60)
            assert page.js("document.documentElement.scrollWidth") == width, "nothing sticks out"
            assert page.errors == []
            assert all(url.startswith((f"http://127.0.0.1:{port}", "data:", "blob:")) for url in page.requests)
    finally:
        app.close()
