"""The app in a real browser (Debian's chromium, found on PATH). Also takes the README's pictures:

    python tests/test_browser.py VIDEO [CHECKPOINTS]  # writes app/screenshots/*.png
"""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import TimeoutError, expect, sync_playwright
from test_app import clip, hevc, run, server  # noqa: F401  fixtures

from mgm_nb.explain import explain, rasterize

root = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
TABS = {"Codec": "#map img", "Masks": "#masks img", "Reconstruct": "#loss img", "Take home": "#link a", "About": "ol"}
LIGHT = "/?checkpoint=none&mask=mgm"  # a page that has little to draw
LONG = 180_000  # ms that a step may take on a loaded machine: the app draws one thing at a time


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None: pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with sync_playwright() as p, p.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as opened: yield opened


@pytest.fixture
def open_page(browser, server):  # noqa: F811
    "Opens pages, and sees to it that none asks anybody but the app, and none reports an error"
    pages = []

    def opened(path="", width=1280, held=None, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.set_default_timeout(LONG)
        if held is not None:  # a list: gets the page's first event, its settings, which waits until it is let go
            page.route("**/queue/join**", lambda route: route.continue_() if held else held.append(route))
        elsewhere, wrong = [], []
        here = ("http://127.0.0.1", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(here) else elsewhere.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(server[1] + path)
        page.wait_for_selector("#video input[type=file], #video video", state="attached")
        pages.append((page, elsewhere, wrong))
        return page

    yield opened
    for page, elsewhere, wrong in pages:
        assert not elsewhere and not wrong
        page.close()


def upload(page, path): page.set_input_files("#video input[type=file]", path)


def finished(page): page.wait_for_selector("#note :text('Shown: frames')", timeout=LONG)


def test_upload_all_tabs_download_and_link(open_page, clip, tmp_path):  # noqa: F811
    page = open_page()
    upload(page, clip)
    page.wait_for_function("document.querySelector('#video video')?.readyState >= 2")  # it plays
    finished(page)
    for tab, content in TABS.items():
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(content).first).to_be_visible(timeout=LONG)
    assert not page.locator("#right img:not([alt])").count()
    assert all(a.get_attribute("alt") for a in page.locator("#right img").all())

    page.get_by_role("tab", name="Masks").click()
    page.wait_for_function("document.querySelector('#film video')?.readyState >= 2")
    page.get_by_role("tab", name="Codec").click()
    frame = page.locator("#frame img")
    expect(frame).to_be_visible(timeout=LONG)
    page.wait_for_function("[...document.querySelectorAll('#map img, #frame img')].every(i => i.complete)")
    before = frame.get_attribute("src")
    page.locator("#map img").click(position={"x": 300, "y": 60})  # another frame
    expect(frame).not_to_have_attribute("src", before, timeout=LONG)

    page.get_by_role("tab", name="Take home").click()
    link = page.locator("#link a").get_attribute("href")
    page.locator("#take").click()
    masks = page.locator("#files a[download='masks.npz']")
    expect(masks).to_be_visible(timeout=LONG)
    with page.expect_download() as download: masks.click()
    download.value.save_as(tmp_path / "masks.npz")
    assert (tmp_path / "masks.npz").stat().st_size > 500

    page = open_page("/" + link[link.index("?"):])
    page.wait_for_selector("#masks img")
    page.wait_for_function("document.querySelector('#video video')?.readyState >= 2")


def test_an_upload_before_the_page_has_its_settings(open_page, clip):  # noqa: F811
    page = open_page("/?seed=7", held=(held := []))
    upload(page, clip)
    page.wait_for_selector("#video video")
    held[0].continue_()
    expect(page.get_by_label("Seed of the masks")).to_have_value("7", timeout=LONG)
    page.get_by_role("tab", name="Codec").click()
    expect(page.locator("#map img")).to_be_visible(timeout=LONG)  # drawn last, from the video on the page


def test_a_link_restores_the_settings(open_page):
    page = open_page("/?video=sprites/up-star-photo-5.mp4&mask=tube&mask=mgm:share=1&ratio=0.9&seed=7")
    finished(page)
    expect(page.get_by_role("gridcell", name="mgm:share=1", exact=True)).to_be_visible()
    assert page.get_by_label("Seed of the masks").input_value() == "7"


def test_stop_and_again(open_page, clip):  # noqa: F811
    page = open_page()
    upload(page, clip)
    page.wait_for_selector("#masks img")  # the first picture is there, others are to come
    page.locator("#stop").click()
    page.wait_for_selector("#note :text('Stopped')")
    page.locator("#go").click()
    finished(page)


def test_a_wrong_file_and_a_codec_without_vectors(open_page, hevc, tmp_path):  # noqa: F811
    text = tmp_path / "text.mp4"
    text.write_text("no video\n" * 100)
    page = open_page(LIGHT)
    upload(page, text)
    expect(page.get_by_text("text.mp4: not a video").first).to_be_visible(timeout=LONG)
    page = open_page(LIGHT)
    upload(page, hevc)
    expect(page.get_by_text("HEVC tells no motion")).to_be_visible(timeout=LONG)
    page.get_by_role("button", name="Re-encode").click()
    finished(page)
    expect(page.get_by_role("button", name="Re-encode")).to_be_hidden()


def test_a_phone_in_the_dark(open_page, clip):  # noqa: F811
    page = open_page(LIGHT, width=390, color_scheme="dark")
    upload(page, clip)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.body.classList.contains('dark')")
    results, settings = (page.locator(s).bounding_box()["y"] for s in ("#right", "#settings"))
    assert results < settings  # what one came for is first


def take_screenshots(video: Path, checkpoints: Path, out: Path = root / "app/screenshots"):
    "A small PNG of each tab"
    out.mkdir(exist_ok=True)
    idea = explain(video, mask=("random", "tube", "mgm"), size=128).pictures()["masks"]()
    Image.fromarray(rasterize(idea, 130)).quantize(256).save(out / "idea.png", optimize=True)
    command = [sys.executable, "-u", root / "app/app.py", "--checkpoints", checkpoints]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, sync_playwright() as p:
        url = next(line for line in process.stdout if "http://" in line).split()[-1]
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, options in {"": {}, "-dark": {"color_scheme": "dark"}}.items():
            page = chromium.new_page(viewport={"width": 1180, "height": 860}, **options)
            page.goto(url)
            page.wait_for_selector("#video input[type=file]", state="attached")
            upload(page, video)
            finished(page)
            for tab, content in TABS.items() if not name else [("Masks", TABS["Masks"])]:
                page.get_by_role("tab", name=tab).click()
                page.wait_for_selector(content)
                try: page.wait_for_load_state("networkidle", timeout=3000)
                except TimeoutError: pass  # a playing video keeps asking
                path = out / f"{tab.lower().replace(' ', '-')}{name}.png"
                page.screenshot(path=path)
                Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
        process.terminate()


if __name__ == "__main__": take_screenshots(*map(Path, sys.argv[1:]))
