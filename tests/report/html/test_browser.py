"""The page in a real browser, its network off: Debian's Chromium, driven by selenium."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from ptq_cli.report.html.build import page
from ptq_cli.report.html.subject import Subject
from tests.report.html import documents
from tests.report.html.test_page import HOSTILE, whole

pytestmark = pytest.mark.browser
MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
MISSING += [] if find_spec("selenium") else ["selenium"]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")


# Of each figure: how many drawings are shown, and of their texts [words, height in pixels, whether
# it lies inside, font, colour].
TEXTS = """
return Array.from(document.querySelectorAll('figure')).map((figure) => {
  const pictures = Array.from(figure.querySelectorAll('svg'));
  const shown = pictures.filter((svg) => svg.getClientRects().length);
  const box = figure.getBoundingClientRect();
  const texts = shown.flatMap((svg) => Array.from(svg.querySelectorAll('text')).map((text) => {
    const place = text.getBoundingClientRect(), style = getComputedStyle(text);
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return [text.textContent, parseFloat(style.fontSize) * scale,
      place.left >= box.left - 6 && place.right <= box.right + 6, style.fontFamily, style.fill];
  }));
  return [shown.length, texts];
});
"""
# Pairs of labels of one drawing that lie on one another.
OVERLAPS = """
return Array.from(document.querySelectorAll('svg')).filter((svg) => svg.getClientRects().length)
  .flatMap((svg) => {
    const boxes = Array.from(svg.querySelectorAll('text')).map((text) =>
      [text.textContent, text.getBoundingClientRect()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
      p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3
    ).map(([b]) => `${a} / ${b}`));
  });
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a network. Missing, it is a failure in CI and a skip elsewhere."""
    if MISSING:
        words = f"needs {', '.join(MISSING)}"
        pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Addresses of pages: small, of 300 layers, of two runs, with hostile names."""
    hostile = [documents.row(f"b.{i}.{n}", (8, 8), 0.01 + i, 2.0) for i, n in enumerate(HOSTILE)]
    subjects = {
        "small": [whole(documents.rows(28))],
        "large": [whole(documents.rows(300))],
        "several": [
            Subject(n, documents.document(documents.rows(28, i))) for i, n in enumerate("ab")
        ],
        "hostile": [whole(hostile, settings={"format": HOSTILE[0], HOSTILE[1]: HOSTILE[2]})],
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, shown in subjects.items():
        (folder / f"{name}.html").write_text(page(shown))
    return {name: Path(folder, f"{name}.html").as_uri() for name in subjects}


def show(browser, address: str, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(address)


def complaints(browser) -> list[str]:
    """What the console says, and every request but for the page itself."""
    said = [entry["message"] for entry in browser.get_log("browser")]
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            said += [] if url == browser.current_url or url.startswith("data:") else [url]
    return said


def first_cells(browser, column: int, rows: int = 10**6) -> list[str]:
    return browser.execute_script(
        "return Array.from(document.querySelectorAll('#layers tbody tr'))"
        ".filter(row => !row.hidden).slice(0, arguments[1])"
        ".map(row => row.cells[arguments[0]].dataset.v ?? row.cells[arguments[0]].textContent)",
        column, rows,
    )  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["small", "large", "several", "hostile"])
def test_the_page_opens_without_a_complaint(browser, pages, name, width, scheme):
    show(browser, pages[name], width, scheme)
    script = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.execute_script(script), "wider than the window"
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
    assert complaints(browser) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_text_in_charts_can_be_read(browser, pages, width):
    """At least 9 pixels high, inside its picture's figure, in the page's font; one drawing of each
    chart is shown."""
    show(browser, pages["large"], width, "light")
    found = browser.execute_script(TEXTS)
    family = browser.execute_script("return getComputedStyle(document.body).fontFamily")
    assert len(found) >= 12
    for count, texts in found:
        assert count == 1
        assert texts
        for text, height, inside, font, fill in texts:
            assert height >= 9, (text, height)
            assert inside, text
            assert font == family
            assert fill in ("rgb(27, 31, 36)", "rgb(89, 97, 109)"), (text, fill)


@pytest.mark.parametrize("name", ["large", "several"])
def test_labels_of_charts_do_not_overlap(browser, pages, name):
    show(browser, pages[name], 390, "light")
    overlaps = browser.execute_script(OVERLAPS)
    assert overlaps == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_sorts_by_mouse_and_keyboard(browser, pages, width):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["large"], width, "light")
    heads = browser.find_elements(By.CSS_SELECTOR, "#layers thead th")
    titles = [head.text for head in heads]
    unsorted = first_cells(browser, 0)
    assert len(unsorted) == 300
    for title in ("Error", "Gain", "Shape", "SQNR, dB"):
        column = titles.index(title)
        button = heads[column].find_element(By.TAG_NAME, "button")
        browser.execute_script(
            "arguments[0].scrollIntoView({inline: 'center', block: 'center'})", button
        )
        button.click()
        values = [float(value.rstrip("x")) for value in first_cells(browser, column)]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) > 1
        assert heads[column].get_attribute("aria-sort") == "descending"
        button.send_keys(Keys.ENTER)
        assert first_cells(browser, column) != values
        values = [float(value.rstrip("x")) for value in first_cells(browser, column)]
        assert values == sorted(values)
        assert heads[column].get_attribute("aria-sort") == "ascending"
        assert sum(head.get_attribute("aria-sort") is not None for head in heads) == 1
    heads[0].find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert first_cells(browser, 0) == sorted(unsorted)
    notes = titles.index("Notes")
    heads[notes].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert [bool(text) for text in first_cells(browser, notes)] == [True] * 6 + [False] * 294
    assert complaints(browser) == []


def test_the_table_filters(browser, pages):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    show(browser, pages["large"], 390, "dark")
    field, count = browser.find_element(By.ID, "find"), browser.find_element(By.ID, "count")
    assert field.is_displayed()
    assert count.text == "300 of 300 layers shown"
    field.send_keys("4.SELF  k_proj")
    names = first_cells(browser, 0)
    assert names
    assert all("4.self" in name and name.endswith("k_proj") for name in names)
    assert count.text == f"{len(names)} of 300 layers shown"
    field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    Select(browser.find_element(By.CSS_SELECTOR, "select[data-column]")).select_by_value("down")
    assert {name.rsplit(".", 1)[1] for name in first_cells(browser, 0)} == {"down_proj"}
    field.send_keys("nothing is called so")
    assert first_cells(browser, 0) == []
    assert count.text == "0 of 300 layers shown"
    assert complaints(browser) == []


def test_everything_is_reached_by_the_keyboard(browser, pages):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["small"], 1280, "light")
    reached = []
    body = browser.find_element(By.TAG_NAME, "body")
    for _ in range(60):
        body.send_keys(Keys.TAB) if not reached else browser.switch_to.active_element.send_keys(
            Keys.TAB
        )
        element = browser.switch_to.active_element
        reached.append(element.text or element.get_attribute("id") or element.tag_name)
        if element.tag_name == "body":
            break
    titles = [b.text for b in browser.find_elements(By.CSS_SELECTOR, "#layers thead button")]
    assert "find" in reached
    assert set(titles) <= set(reached)


def test_names_do_nothing_in_a_browser(browser, pages):
    """No element and no dialog comes of a name; the policy would have stopped a script."""
    show(browser, pages["hostile"], 1280, "light")
    assert browser.execute_script("return document.images.length") == 0
    assert browser.execute_script("return document.scripts.length") == 1
    inside = "const s = document.createElement('script'); s.textContent = 'window.evil = 1';"
    browser.execute_script(inside + " document.body.append(s)")
    assert browser.execute_script("return window.evil") is None


def test_without_scripts_the_table_is_whole(browser, pages):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, pages["small"], 390, "light")
        from selenium.webdriver.common.by import By

        assert len(browser.find_elements(By.CSS_SELECTOR, "#layers tbody tr")) == 28
        assert not browser.find_element(By.ID, "controls").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
