"""JupyterLab as a person uses it: open a notebook in a browser, run all cells, look at the pictures, move a slider."""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from playwright.sync_api import expect

from nodules import course, paths
from nodules.tools import run

MINUTES = 60_000  # milliseconds
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(browser):
    """A page of the system's browser."""
    return browser.new_page(viewport={"width": 1400, "height": 1000})


@pytest.fixture(scope="module")
def lab(smoke_run, tmp_path_factory):
    """The address of a JupyterLab with this environment's kernel, on copies of the notebooks that run small."""
    folder, run_dir = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("run") / "smoke-phantom"
    shutil.copytree(smoke_run, run_dir)
    chosen = run.read_profile(paths.ROOT / "params" / "smoke.yaml") | {"run_dir": str(run_dir)}
    for path in paths.NOTEBOOKS.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        known = course.parameters(path)
        cell.source += "".join(f"\n{key} = {value!r}" for key, value in chosen.items() if key in known)
        nbformat.write(notebook, folder / path.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += [f"--notebook-dir={folder}", "--IdentityProvider.token=", "--ServerApp.port_retries=0"]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}/lab"
        _wait(address)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _wait(address):
    for _ in range(240):
        try:
            return urllib.request.urlopen(address).close()
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)


def run_all(page, address, name):
    """Open a notebook, run all its cells by the menu, wait until the last has run, and leave a screenshot."""
    page.goto(f"{address}/tree/{name}.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=2 * MINUTES)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    last = page.locator(".jp-CodeCell .jp-InputPrompt").last
    expect(last).to_have_text(r"[*]:", timeout=MINUTES)
    expect(last).not_to_have_text(r"[*]:", timeout=8 * MINUTES)
    assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"] >> text=Traceback').count() == 0
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0


def pictures(page):
    """Widths of the pictures shown, as the browser decoded them."""
    return page.locator(".jp-RenderedImage img").evaluate_all(
        "pictures => pictures.map(picture => picture.naturalWidth)"
    )


def moved(page, box):
    """Move each slider of a box of controls, and see that its picture changes."""
    picture = box.locator(".widget-image")
    picture.scroll_into_view_if_needed()

    def seen():
        fetched = "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"
        return hashlib.sha256(bytes(picture.evaluate(fetched))).hexdigest()

    for slider in box.locator(".noUi-target").all():
        before, handle = seen(), slider.locator(".noUi-handle").last
        handle.focus()
        for _ in range(12):
            handle.press("ArrowLeft")
        deadline = time.monotonic() + 60
        while seen() == before and time.monotonic() < deadline:
            page.wait_for_timeout(250)
        assert seen() != before, "the slider moved and the picture stayed"
        page.wait_for_timeout(2000)  # until the last press is drawn
    return box.locator(".noUi-target").count()


def test_the_pictures_are_seen_and_a_guess_is_answered(page, lab, tmp_path):
    run_all(page, lab, "01_data")
    shown = pictures(page)
    assert len(shown) == 6 and min(shown) > 500
    assert "<Figure" not in page.locator(".jp-Notebook").inner_text()
    picture = page.locator(".jp-RenderedImage img").nth(1)
    page.mouse.move(800, 500)
    deadline = time.monotonic() + 60
    while picture.bounding_box()["y"] < 100 and time.monotonic() < deadline:
        page.mouse.wheel(0, -200)
        page.wait_for_timeout(100)
    expect(picture).to_be_in_viewport(ratio=0.9)
    page.screenshot(path=tmp_path / "01_data.png")
    assert moved(page, page.locator(".widget-vbox:has(> .widget-image)")) == 2
    guess = page.locator(".widget-vbox:has-text('always giving') .noUi-handle")
    guess.scroll_into_view_if_needed()
    guess.focus()
    guess.press("ArrowRight")
    answer = page.locator(".jp-CodeCell:has-text('guess.compare')")
    answer.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    expect(answer.locator(".jp-OutputArea-output")).to_contain_text("You guessed 0.51", timeout=MINUTES)


@pytest.mark.parametrize(
    ("name", "sliders"), [("03_learning_rate", [1]), ("07_interpretation", [1, 1]), ("08_evaluation", [1])]
)
def test_the_controls_answer(page, lab, tmp_path, name, sliders):
    run_all(page, lab, name)
    assert min(pictures(page)) > 500
    boxes = page.locator(".widget-vbox:has(> .widget-image)").all()
    assert [moved(page, box) for box in boxes] == sliders
    page.screenshot(path=tmp_path / f"{name}.png")


def test_a_click_in_a_scan_chooses_a_place(page, lab, tmp_path):
    run_all(page, lab, "10_your_own_scan")
    picture = page.get_by_alt_text("axial slice; click to choose a place")
    picture.scroll_into_view_if_needed()
    where = page.locator(".widget-label:has-text('voxel')").last
    before = where.inner_text()
    picture.click(position={"x": 100, "y": 120})
    expect(where).not_to_have_text(before, timeout=MINUTES)
    assert min(pictures(page)) > 500
    page.screenshot(path=tmp_path / "10_your_own_scan.png")
