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


def test_the_pictures_are_seen(page, lab, tmp_path):
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


def test_the_widget_answers(page, lab, tmp_path):
    run_all(page, lab, "06_interpretation")
    assert min(pictures(page)) > 500
    widget = page.locator(".jp-OutputArea .widget-image")
    widget.scroll_into_view_if_needed()

    def seen():
        fetched = "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"
        return hashlib.sha256(bytes(widget.evaluate(fetched))).hexdigest()

    before = seen()
    handle = page.locator(".noUi-handle-upper")
    handle.focus()
    for _ in range(12):  # from 1 down to 0.4: the surest patch is no longer among those to pick from
        handle.press("ArrowLeft")
    deadline = time.monotonic() + 60
    while seen() == before and time.monotonic() < deadline:
        page.wait_for_timeout(250)
    page.screenshot(path=tmp_path / "06_interpretation.png")
    assert seen() != before, "the slider moved and the picture stayed"
