"""compare.html in a real browser: it sorts, filters and shows rows, loads nothing, and fits a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import compared
from vlmtune import comparison

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

ATTACK = "</script><script>window.attacked = true</script><img src=x onerror='window.attacked = true'>"
GRID = [(r, rate) for r in (4, 16, 8) for rate in ("1e-4", "1e-3")]
IMAGES, ROWS = 30, 2


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of six runs over three keys, the later ones better; a failure, and an answer that is an attack."""
    folder = tmp_path_factory.mktemp("sweep")
    table = compared.write_table(folder / "data", IMAGES, ROWS)
    sweep = folder / "adapter.r" / "stamp"
    swept = [[f"adapter.r={r}", f"trainer.learning_rate={rate}", "adapter.lora_dropout=0.1"] for r, rate in GRID]
    compared.write_sweep(sweep, [*swept, ["adapter.r=0"]])
    for number, words in enumerate(swept):
        right = [row % (number + 2) > 0 for row in range(IMAGES * ROWS)]
        compared.write_run(sweep / str(number), table, right, words)
    answers = sweep / "5" / "predictions.csv"
    answers.write_text(answers.read_text().replace(",no,", f',"{ATTACK}",'))
    compared.write_failure(sweep / "6", "config", ATTACK)
    assert comparison.finish(sweep).endswith("compare.html")
    return sweep / "compare.html"


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(started: Any, page: Path) -> Any:
    """The page, newly opened."""
    started.get(page.as_uri())
    return started


def visible(browser: Any) -> list[str]:
    """The runs in the first table, from the top."""
    rows = browser.find_elements("css selector", ".ranked")[0].find_elements("css selector", "tbody tr")
    return [row.get_attribute("data-of") for row in rows if row.is_displayed()]


def heading(browser: Any, text: str) -> Any:
    buttons = browser.find_elements("css selector", ".ranked thead button")
    return next(button for button in buttons if button.text.split()[0] == text)


def choose(browser: Any, left: int, right: int) -> list[Any]:
    """Choose two runs; the rows that are then shown."""
    for name, number in (("left", left), ("right", right)):
        browser.find_element("css selector", f"#{name} option[value='{number}']").click()
    return list(browser.find_elements("css selector", "#rows article"))


def test_a_heading_sorts_and_sorts_back(browser: Any) -> None:
    assert visible(browser) == ["5", "4", "3", "2", "1", "0"]
    heading(browser, "r").click()
    assert [GRID[int(name)][0] for name in visible(browser)] == [4, 4, 8, 8, 16, 16]  # as numbers, not as texts
    heading(browser, "r").click()
    assert [GRID[int(name)][0] for name in visible(browser)] == [16, 16, 8, 8, 4, 4]
    heading(browser, "run").click()
    assert visible(browser) == ["5", "4", "3", "2", "1", "0"]  # the ranking


def test_the_filter_hides_runs_everywhere(browser: Any) -> None:
    browser.find_element("id", "filter").send_keys("r=8 lr=1e-3")
    assert visible(browser) == ["5"]
    assert browser.find_element("id", "shown").text == "1 of 6 runs"
    assert {mark.get_attribute("data-of") for mark in browser.find_elements("css selector", ".mark:not(.gone)")} == {
        "5"
    }
    for _ in "r=8 lr=1e-3":
        browser.find_element("id", "filter").send_keys("\ue003")  # backspace
    assert len(visible(browser)) == 6


def test_two_chosen_runs_show_the_rows_on_which_they_differ(browser: Any) -> None:
    names = [option.text.split(":")[0] for option in browser.find_elements("css selector", "#left option")]
    assert names == ["5", "4", "3", "2", "1", "0"]
    shown = choose(browser, names.index("4"), names.index("0"))
    differ = [row for row in range(IMAGES * ROWS) if (row % 2 > 0) != (row % 6 > 0)]
    assert browser.find_element("id", "count").text.startswith(f"Their scores differ on {len(differ)} of 60 rows")
    assert len(shown) == len(differ)
    assert shown[0].find_element("css selector", ".right").text.endswith(("red", "green", "blue"))
    assert shown[0].find_element("css selector", ".wrong").text.endswith("no")
    width = "return [...document.querySelectorAll('#rows img')].map(image => image.naturalWidth)"
    assert set(browser.execute_script(width)) == {48}
    assert choose(browser, 0, 0) == []


def test_hovering_shows_a_run_everywhere(browser: Any) -> None:
    mark = browser.find_element("css selector", ".mark[data-of='4'] circle")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    webdriver.ActionChains(browser).move_to_element(mark).perform()
    assert browser.find_element("id", "tip").text.startswith("4: r=8 lr=1e-4 lora_dropout=0.1: 0.8333 (")
    lit = {element.get_attribute("data-of") for element in browser.find_elements("css selector", ".on")}
    assert lit == {"4"}


def test_text_of_others_stays_text(browser: Any) -> None:
    [*shown] = choose(browser, 0, 1)
    assert any(ATTACK in article.text for article in shown)
    assert ATTACK in browser.find_element("css selector", ".out").text
    assert browser.execute_script("return window.attacked") is None


def test_nothing_is_loaded_and_nothing_goes_wrong(browser: Any, page: Path) -> None:
    """Neither a request of the page nor a complaint of the browser, a violation of its own policy among them."""
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in sent if not url.startswith("data:image/jpeg;base64,")} == {page.as_uri()}
    assert browser.get_log("browser") == []
    policy = browser.find_element("css selector", "meta[http-equiv]").get_attribute("content")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_phone_shows_all_without_scrolling_sideways(browser: Any) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.refresh()
        assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        right = "return [...document.querySelectorAll('main > *')].map(part => part.getBoundingClientRect().right)"
        assert max(browser.execute_script(right)) <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_plots_are_there_for_each_key_and_cost(browser: Any) -> None:
    labels = [svg.get_attribute("aria-label") for svg in browser.find_elements("css selector", "figure svg")]
    assert [label for label in labels if label.startswith("exact_match by")] == [
        f"exact_match by {name}" for name in ("r", "lr", "lora_dropout", "training time", "peak memory")
    ]
    assert {"one line per run across all keys", "eval/exact_match by optimizer step"} <= set(labels)
    assert len(browser.find_elements("css selector", ".across")) == len(GRID)
