"""The page to talk to in a real browser: images in, answers streamed side by side, nothing from elsewhere."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import talk
import tiny
from vlmtune.serve import Server, Side

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
ATTACK = "<img src=x onerror='window.attacked = true'><script>window.attacked = true</script>"
WATCH = """
window.sent = []; window.seen = {};
const real = window.fetch;
window.fetch = (...given) => {
  if (given[0] === "ask") window.sent.push(JSON.parse(given[1].body));
  return real(...given);
};
new MutationObserver(() => document.querySelectorAll(".said").forEach((said, number) =>
  (window.seen[number] = [...new Set([...(window.seen[number] || []), said.textContent])])))
  .observe(document.getElementById("log"), {childList: true, subtree: true, characterData: true});
"""
"""Keeps each question that is sent, and each text that an answer had on its way."""


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]) -> list[Side]:
    other = tiny.build("qwen2_vl", tmp_path_factory.mktemp("other"), seed=1)
    return [talk.side("before", checkpoint_of("qwen2_vl")), talk.side("after", other)]


@pytest.fixture(scope="module")
def server(sides: list[Side]) -> Iterator[Server]:
    with talk.served(sides) as server:
        yield server


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
def browser(started: Any, server: Server) -> Iterator[Any]:
    """The page, newly opened; at the end nothing may stand in the console."""
    started.get(server.address)
    started.execute_script(WATCH)
    until(lambda: of(started, "send").is_enabled())
    started.get_log("browser")
    yield started
    assert [entry["message"] for entry in started.get_log("browser")] == []


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    tiny.image().save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def of(browser: Any, name: str) -> Any:
    return browser.find_element("id", name)


def all_of(browser: Any, selector: str) -> list[Any]:
    return list(browser.find_elements("css selector", selector))


def until(is_so: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def add(browser: Any, file: Path) -> None:
    before = len(all_of(browser, "#pending li"))
    of(browser, "file").send_keys(str(file))
    until(lambda: len(all_of(browser, "#pending li")) > before)


def ask(browser: Any, question: str) -> list[str]:
    """Ask with the Enter key; the answers of the last exchange."""
    of(browser, "question").send_keys(question + ENTER)
    until(lambda: of(browser, "send").is_displayed() and not all_of(browser, ".running"))
    return [said.text for said in all_of(browser, ".exchange:last-child .said")]


def change(browser: Any, name: str, value: str) -> None:
    """Type another value into a field of the settings."""
    of(browser, "settings").click()
    of(browser, name).clear()
    of(browser, name).send_keys(value)


def test_answers_are_streamed_side_by_side(browser: Any, picture: Path, server: Server) -> None:
    add(browser, picture)
    answers = ask(browser, "What color is it?")
    key = browser.execute_script("return sent[0].turns[0].images[0]")
    with talk.Client(server) as client:
        turns = [{"question": "What color is it?", "images": [key]}]
        wanted = [" ".join(client.ask(turns, side=side, max_new_tokens=12)[0].split()) for side in (0, 1)]
    assert [" ".join(answer.split()) for answer in answers] == wanted
    seen = browser.execute_script("return seen")
    assert min(len(seen["0"]), len(seen["1"])) > 3
    left, right = (card.rect for card in all_of(browser, ".answer"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    names = [card.get_attribute("aria-label") for card in all_of(browser, ".answer")]
    assert names == ["Answer of before", "Answer of after"]
    feet = [foot.text for foot in all_of(browser, ".answer .soft")]
    assert feet[0].startswith("12 tokens")
    assert feet[1].endswith("another answer")
    assert "before: " in of(browser, "status").get_attribute("textContent")


def test_each_model_sees_its_own_earlier_answers(browser: Any, picture: Path) -> None:
    add(browser, picture)
    ask(browser, "What color is it?")
    ask(browser, "Is it red?")
    for sent in browser.execute_script("return sent.slice(2)"):
        first, second = sent["turns"]
        assert first["question"] == "What color is it?"
        assert len(first["images"]) == 1
        assert first["answer"] == browser.execute_script(f"return exchanges[0].answers[{sent['side']}]") != ""
        assert second == {"question": "Is it red?", "images": []}
    of(browser, "fresh").click()
    assert all_of(browser, ".exchange") == []
    ask(browser, "Is it red?")
    assert browser.execute_script("return sent[4].turns") == [{"question": "Is it red?", "images": []}]


def test_images_can_be_dropped_pasted_and_taken_back(browser: Any) -> None:
    given = """
    const done = arguments[2], transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(arguments[1]), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], arguments[0] + ".png", {type: "image/png"}));
    const event = arguments[0] === "drop"
      ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
      : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true});
    document.body.dispatchEvent(event);
    done(event.defaultPrevented);
    """
    for number, kind in enumerate(("drop", "paste")):
        content = base64.b64encode(talk.png(tiny.image(seed=number))).decode()
        assert browser.execute_async_script(given, kind, content)
        until(lambda number=number: len(all_of(browser, "#pending img")) == number + 1)
    first, second = all_of(browser, "#pending img")
    assert first.get_attribute("src") != second.get_attribute("src")
    until(lambda: browser.execute_script("return arguments[0].naturalWidth", first) == 56)
    first.find_element("xpath", "../button").click()
    assert len(all_of(browser, "#pending img")) == 1


def test_texts_are_shown_as_texts(browser: Any) -> None:
    ask(browser, ATTACK)
    assert all_of(browser, ".asked p")[0].text == ATTACK
    assert browser.execute_script("return window.attacked") is None


def test_what_is_no_image_is_said_and_costs_nothing(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "notes.png"
    file.write_text("no image")
    of(browser, "file").send_keys(str(file))
    until(lambda: of(browser, "problem").is_displayed())
    assert of(browser, "problem").text.startswith("notes.png: not an image: save it as PNG or JPEG")
    browser.get_log("browser")  # the browser's own note of a refused request
    ask(browser, "What color?")
    assert not of(browser, "problem").is_displayed()


def test_a_file_that_is_too_large_is_not_sent(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(bytes(33 * 2**20))
    of(browser, "file").send_keys(str(file))
    until(lambda: of(browser, "problem").is_displayed())
    assert of(browser, "problem").text == "large.png: has 33.0 MiB, above 32 MiB"


@pytest.mark.parametrize("way", ["escape", "stop", "fresh"])
def test_an_answer_can_be_stopped(browser: Any, server: Server, way: str) -> None:
    change(browser, "tokens", "3000")
    of(browser, "question").send_keys("What color?" + ENTER)
    until(lambda: len(all_of(browser, ".said")[0].text) > 20)
    if way == "escape":
        of(browser, "question").send_keys(ESCAPE)
    else:
        of(browser, way).click()
    until(lambda: not server.generating.locked(), 5)
    until(lambda: of(browser, "send").is_displayed())
    assert [foot.text for foot in all_of(browser, ".answer .soft")] == ([] if way == "fresh" else ["stopped"] * 2)
    assert len(browser.execute_script("return sent")) == 1  # the other model was not asked
    assert len(browser.execute_script("return exchanges")) == (way != "fresh")
    change(browser, "tokens", "5")
    assert ask(browser, "Is it red?")[1]


def test_a_setting_that_can_not_be_is_named(browser: Any) -> None:
    change(browser, "temperature", "-1")
    of(browser, "question").send_keys("What color?" + ENTER)
    assert of(browser, "problem").text.startswith("Temperature: ")
    assert of(browser, "temperature").is_displayed()
    assert of(browser, "question").get_property("value") == "What color?"


def test_settings_decide_how_an_answer_is_drawn(browser: Any) -> None:
    for name, value in (("temperature", "1.5"), ("tokens", "7"), ("seed", "3")):
        change(browser, name, value)
        of(browser, "settings").click()
    drawn = [ask(browser, "What color?")]
    of(browser, "fresh").click()
    drawn.append(ask(browser, "What color?"))
    sent = browser.execute_script("return sent[0]")
    assert (sent["temperature"], sent["max_new_tokens"], sent["seed"]) == (1.5, 7, 3)
    assert drawn[0] == drawn[1]


def test_it_fits_a_phone(browser: Any, picture: Path) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        add(browser, picture)
        ask(browser, "What color is it? " + "a" * 90)
        wide = "e => e.getBoundingClientRect().right > 361"
        assert browser.execute_script(f"return [...document.querySelectorAll('body *')].filter({wide}).length") == 0
        assert browser.execute_script("return document.documentElement.scrollHeight") == 740
        first, second = (card.rect for card in all_of(browser, ".answer"))
        assert first["x"] == second["x"]
        assert first["y"] + first["height"] < second["y"]
        assert of(browser, "send").rect["y"] < 740
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_is_named_and_reached_by_keyboard(browser: Any) -> None:
    named = """
    return [...document.querySelectorAll("button, input:not([hidden]), textarea, summary")].filter((e) =>
      !(e.getAttribute("aria-label") || e.textContent.trim() || (e.labels && e.labels.length))).map((e) => e.outerHTML)
    """
    assert browser.execute_script(named) == []
    assert browser.execute_script("return document.activeElement.id") == "question"
    reached = []
    for _ in range(7):
        webdriver.ActionChains(browser).send_keys(TAB).perform()
        reached.append(browser.execute_script("return document.activeElement.id || document.activeElement.tagName"))
    assert {"send", "SUMMARY", "pick", "attach", "question"} <= {*reached}


def test_nothing_comes_from_elsewhere(browser: Any, picture: Path, server: Server) -> None:
    browser.get_log("performance")
    browser.refresh()
    until(lambda: of(browser, "send").is_enabled())
    add(browser, picture)
    ask(browser, "What color is it?")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 4
    assert [address for address in asked if not address.startswith((server.address, "data:"))] == []


def test_a_server_that_is_gone_is_said(started: Any, sides: list[Side]) -> None:
    server = Server(sides)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    thread.start()
    started.get(server.address)
    until(lambda: of(started, "send").is_enabled())
    server.shutdown()
    server.server_close()
    thread.join()
    started.execute_script("document.getElementById('question').value = 'What?'; ask()")
    until(lambda: "failed" in all_of(started, ".answer")[0].get_attribute("class"))
    assert all_of(started, ".said")[0].text in (
        "the server can't be reached; is it still running?",
        "the server was ended",  # on a connection that was open
    )
    started.get_log("browser")
