"""Answer a study in Chromium, export the answers and score them."""

import json
from collections import Counter

import pytest
from browser import PHONE, show_on
from forks import WAIT_S
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from study_data import HOSTILE, make_dataset

from madgen.user_study.design import Design
from madgen.user_study.make import make_study

SHOWN = """
const name = (id) => [...document.querySelectorAll('script[type="application/json"]')]
  .find((block) => JSON.parse(block.textContent) === document.getElementById(id).src).id;
return {first: name("first"), second: name("second"), prompt: document.getElementById("prompt").textContent,
        position: document.getElementById("position").textContent};
"""


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    return [make_dataset(root / name, shade, size=(64, 384)) for name, shade in (("mad", 40), ("multi", 120))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, roots):
    folder = tmp_path_factory.mktemp("study") / "study"
    make_study(roots, folder, Design(pairs=5, controls=3, ties=True))
    return folder


@pytest.fixture
def key(folder):
    return json.loads((folder / "key.json").read_text(encoding="utf-8"))


class Session:
    """A participant's session in the browser, driven with the key."""

    def __init__(self, driver, folder, name):
        self.driver, self.key, self.name = driver, json.loads((folder / "key.json").read_text(encoding="utf-8")), name
        driver.get(f"{(folder / 'public' / 'index.html').as_uri()}?participant={name}")

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def start(self):
        self.find("#start button").click()

    def shown(self):
        """Return the current item once its images are loaded."""
        waiting = WebDriverWait(self.driver, WAIT_S, ignored_exceptions=[JavascriptException])
        return waiting.until(lambda driver: driver.execute_script(SHOWN))

    def item(self, shown):
        pair = sorted((shown["first"], shown["second"]))
        return next(item for item in self.key["items"].values() if item["pictures"] == pair)

    def choice_for(self, shown, prefer, correct=True):
        """Return the choice of a participant who prefers dataset `prefer`, None for neither."""
        item = self.item(shown)
        for side in ("first", "second"):
            if "right" in item and (shown[side] == item["right"]) == correct:
                return side
            if "right" not in item and self.key["pictures"][shown[side]]["dataset"] == prefer:
                return side
        return "same"

    def click(self, choice):
        self.find(f"[data-choice={choice}]").click()

    def press(self, *keys):
        for pressed in keys:
            self.find("body").send_keys(pressed)

    def answer_all(self, prefer, correct=True, count=8):
        for _ in range(count):
            self.click(self.choice_for(self.shown(), prefer, correct))

    def exported(self):
        return json.loads(self.find("#answers").get_attribute("value"))


@pytest.fixture
def open_session(chromium, folder):
    """Return a function that opens a session; the page must log nothing and make no requests."""
    sessions = []

    def open_(name, study=folder):
        sessions.append(Session(chromium, study, name))
        return sessions[-1]

    yield open_
    assert chromium.get_log("browser") == []
    requests = chromium.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in requests if not name.startswith("data:")] == []


def test_exported_answers_are_scored(open_session, chromium, folder, tmp_path, madgen_here):
    """Two participants prefer the first dataset, one fails the controls; file, text and clipboard are the same."""
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    chromium.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    for name, prefer, correct in (("ann", 0, True), ("bob", 0, True), ("eve", 1, False)):
        session = open_session(name)
        session.start()
        session.answer_all(prefer, correct)
        assert session.find("#thanks").text == "Thank you!"
        session.find("#download").click()
        session.find("#copy").click()
        path = tmp_path / f"answers-{name}.json"
        WebDriverWait(chromium, WAIT_S).until(lambda _, path=path: path.exists())
        pasted = chromium.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        assert json.loads(pasted) == json.loads(path.read_text(encoding="utf-8")) == session.exported()
        assert json.loads(pasted)["finished"] is True
    result = madgen_here("study", "--score", *sorted(tmp_path.glob("answers*.json")), "-o", folder)
    assert (result.code, result.out) == (0, (folder / "report.md").read_text(encoding="utf-8"))
    assert "| **all** | 100.0% |" in result.out
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (found,) = report["comparisons"]
    assert (found["first"], found["second"], found["overall"]["rate"]) == ("mad", "multi", 1.0)
    assert found["overall"]["answers"] == 10
    assert report["participants"] == {"given": 3, "kept": 2, "dropped": {"eve": {"right": 0, "answered": 3}}}


def test_keyboard_answers_and_goes_back(open_session):
    session = open_session("keys")
    session.start()
    session.press("1", Keys.ARROW_DOWN, Keys.ARROW_LEFT, "0", "2", "x", "5")
    assert session.shown()["position"] == "6 of 8"
    session.press(Keys.BACKSPACE, Keys.BACKSPACE)
    assert session.find("[data-choice=same]").get_attribute("aria-pressed") == "true"
    session.press(Keys.ARROW_UP)
    session.find("#stop").click()
    assert session.find("#status").text == "You have answered 5 of 8 questions."
    choices = [answer["choice"] for answer in session.exported()["answers"]]
    assert choices == ["first", "second", "first", "first", "second"]
    assert session.exported()["finished"] is False
    session.find("#resume").click()
    assert session.shown()["position"] == "6 of 8"


def reload(driver):
    """Reload and wait for the script of the new page."""
    driver.execute_script("window.old = true")
    driver.refresh()
    WebDriverWait(driver, WAIT_S).until(
        lambda _: driver.execute_script("return !window.old && document.readyState === 'complete'")
    )


def test_reload_keeps_answers(open_session, chromium):
    session = open_session("reload")
    session.start()
    session.press("1", "2", "1")
    before = session.shown()
    reload(chromium)
    assert session.shown() == before
    session.answer_all(0, count=5)
    answers = session.exported()["answers"]
    reload(chromium)
    assert session.exported()["answers"] == answers
    assert [answer["choice"] for answer in answers[:3]] == ["first", "second", "first"]
    assert [answer["position"] for answer in answers] == list(range(8))


def test_note_is_shown_if_answers_cannot_be_saved(open_session, chromium):
    session = open_session("private")
    chromium.execute_script("Storage.prototype.setItem = () => { throw new DOMException('no', 'QuotaExceededError'); }")
    session.start()
    assert session.find("#unsaved").is_displayed()
    session.answer_all(0)
    assert len(session.exported()["answers"]) == 8


def test_order_and_sides_are_drawn_per_participant(open_session, key):
    """Every item is shown once; order and sides vary between participants."""
    orders, sides = [], Counter()
    for at in range(12):
        session = open_session(f"p{at}")
        session.start()
        session.press(*"11111111")
        content = session.exported()
        orders.append(tuple(answer["item"] for answer in content["answers"]))
        sides.update(answer["first"] == key["items"][answer["item"]]["pictures"][0] for answer in content["answers"])
        assert sorted(orders[-1]) == sorted(key["items"])
    # Random orders fail this about once in 300,000 runs.
    assert len(set(orders)) >= 11
    assert len({order[0] for order in orders}) >= 3
    assert 25 < sides[True] < 71  # of 96; a fair coin fails this once in 300,000 runs


def test_next_participant_starts_over(open_session, chromium, folder):
    session = open_session("")
    own = session.find("#participant").get_attribute("value")
    session.find("#participant").clear()
    session.find("#participant").send_keys("  Zoë / 7 ")
    session.start()
    session.answer_all(0)
    before = session.exported()
    assert before["participant"] == "Zoë / 7"
    session.find("#next").click()
    chromium.switch_to.alert.dismiss()
    assert session.exported() == before
    session.find("#next").click()
    chromium.switch_to.alert.accept()
    assert session.find("#participant").get_attribute("value") not in ("", own, "Zoë / 7")
    session.start()
    session.find("#stop").click()
    assert session.exported()["answers"] == []
    assert session.exported()["seed"] != before["seed"]


def test_hostile_prompts_are_shown_as_text(open_session, chromium):
    session = open_session("hostile")
    session.start()
    prompts = set()
    for _ in range(8):
        prompts.add(session.shown()["prompt"])
        session.press("1")
    assert HOSTILE in prompts
    assert chromium.execute_script("return document.querySelectorAll('img').length") == 2


def test_elements_have_accessible_names_and_changes_are_announced(open_session, chromium):
    session = open_session("aria")
    session.start()
    names = chromium.execute_script(
        "return [...document.querySelectorAll('#comparison button, #comparison img, #comparison progress')].map((e) => "
        "e.textContent.trim() || e.alt || document.getElementById(e.getAttribute('aria-labelledby')).textContent)"
    )
    assert len(names) == 9
    assert all(names)
    assert session.find("#announcement").get_attribute("role") == "status"
    assert session.find("#announcement").get_attribute("textContent") == "Question 1 of 8"
    assert chromium.switch_to.active_element.get_attribute("id") == "question"
    session.press("1")
    assert session.find("#announcement").get_attribute("textContent") == "Question 2 of 8"
    assert session.find("#progress").get_attribute("value") == "1"


def test_phone_shows_whole_images_and_enlarges_both(open_session, chromium):
    show_on(chromium, PHONE, touch=True)
    session = open_session("phone")
    session.start()
    WebDriverWait(chromium, WAIT_S).until(
        lambda _: all(session.find(side).size["height"] > 30 for side in ("#first", "#second"))
    )
    width, height = PHONE
    assert chromium.execute_script("return document.scrollingElement.scrollWidth") <= width
    for side in ("first", "second"):
        box = session.find(f"#{side}").rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["width"] / box["height"] == pytest.approx(6, rel=0.05)
    for button in chromium.find_elements(By.CSS_SELECTOR, "[data-choice]"):
        assert button.rect["height"] >= 44
        assert button.rect["y"] + button.rect["height"] <= height
    session.find("#size").click()
    assert session.find("#first").rect["height"] > 200
    chromium.execute_script("document.querySelector('.strip').scrollLeft = 300")
    scrolled = "return [...document.querySelectorAll('.strip')].map((strip) => Math.round(strip.scrollLeft))"
    WebDriverWait(chromium, WAIT_S).until(lambda _: chromium.execute_script(scrolled) == [300, 300])
    assert chromium.execute_script("return document.scrollingElement.scrollWidth") <= width


def test_tall_panoramas_are_side_by_side_without_tie_button(open_session, chromium, tmp_path):
    roots = [make_dataset(tmp_path / name, shade, size=(384, 64), samples=1) for name, shade in (("a", 40), ("b", 90))]
    make_study(roots, tmp_path / "study", Design(pairs=2, controls=0))
    session = open_session("tall", tmp_path / "study")
    session.start()
    pair = session.find("#pair")
    WebDriverWait(chromium, WAIT_S).until(lambda _: "tall" in pair.get_attribute("class"))
    first, second = session.find("#first").rect, session.find("#second").rect
    assert first["x"] + first["width"] <= second["x"]
    assert abs(first["y"] - second["y"]) < 2
    assert second["y"] + second["height"] < 800
    assert not session.find("[data-choice=same]").is_displayed()
    session.press("0")
    assert session.shown()["position"] == "1 of 2"
