"""The page in a real Chromium: answered by a script, handed over, scored."""

import json
from collections import Counter

import pytest
from browser import PHONE, show_on
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
        where: document.getElementById("where").textContent};
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
    return json.loads((folder / "key.json").read_text())


class Person:
    """Who sits at the browser, and knows the key."""

    def __init__(self, driver, folder, name):
        self.driver, self.key, self.name = driver, json.loads((folder / "key.json").read_text()), name
        driver.get(f"{(folder / 'public' / 'index.html').as_uri()}?participant={name}")

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def begin(self):
        self.find("#start button").click()

    def shown(self):
        """What is asked, as soon as its pictures are in place."""
        waiting = WebDriverWait(self.driver, 60, ignored_exceptions=[JavascriptException])
        return waiting.until(lambda driver: driver.execute_script(SHOWN))

    def item(self, shown):
        pair = sorted((shown["first"], shown["second"]))
        return next(item for item in self.key["items"].values() if item["pictures"] == pair)

    def wanted(self, shown, prefer, rightly=True):
        """first, second or same, for a participant who prefers the dataset `prefer`, None for neither."""
        item = self.item(shown)
        for side in ("first", "second"):
            if "right" in item and (shown[side] == item["right"]) == rightly:
                return side
            if "right" not in item and self.key["pictures"][shown[side]]["dataset"] == prefer:
                return side
        return "same"

    def click(self, choice):
        self.find(f"[data-choice={choice}]").click()

    def press(self, *keys):
        for pressed in keys:
            self.find("body").send_keys(pressed)

    def answer_all(self, prefer, rightly=True, count=8):
        for _ in range(count):
            self.click(self.wanted(self.shown(), prefer, rightly))

    def exported(self):
        return json.loads(self.find("#answers").get_attribute("value"))


@pytest.fixture
def person(chromium, folder):
    """A participant at the page; nothing may be said on the console, and nothing asked of the network."""
    people = []

    def come(name, study=folder):
        people.append(Person(chromium, study, name))
        return people[-1]

    yield come
    assert chromium.get_log("browser") == []
    asked = chromium.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in asked if not name.startswith("data:")] == []


def test_answers_are_handed_over_and_scored(person, chromium, folder, tmp_path, madgen_here):
    """Two who prefer the first dataset and one who fails the controls, by mouse: file, text and clipboard are alike."""
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    chromium.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    for name, prefer, rightly in (("ann", 0, True), ("bob", 0, True), ("eve", 1, False)):
        sitting = person(name)
        sitting.begin()
        sitting.answer_all(prefer, rightly)
        assert sitting.find("#thanks").text == "Thank you!"
        sitting.find("#download").click()
        sitting.find("#copy").click()
        path = tmp_path / f"answers-{name}.json"
        WebDriverWait(chromium, 60).until(lambda _, path=path: path.exists())
        pasted = chromium.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        assert json.loads(pasted) == json.loads(path.read_text()) == sitting.exported()
        assert json.loads(pasted)["finished"] is True
    result = madgen_here("study", "--score", *sorted(tmp_path.glob("answers*.json")), "-o", folder)
    assert (result.code, result.out) == (0, (folder / "report.md").read_text())
    assert "| **all** | 100.0% |" in result.out
    report = json.loads((folder / "report.json").read_text())
    (found,) = report["comparisons"]
    assert (found["first"], found["second"], found["overall"]["rate"]) == ("mad", "multi", 1.0)
    assert found["overall"]["answers"] == 10
    assert report["participants"] == {"given": 3, "kept": 2, "dropped": {"eve": {"right": 0, "answered": 3}}}


def test_keys_answer_and_go_back(person):
    sitting = person("keys")
    sitting.begin()
    sitting.press("1", Keys.ARROW_DOWN, Keys.ARROW_LEFT, "0", "2", "x", "5")
    assert sitting.shown()["where"] == "6 of 8"
    sitting.press(Keys.BACKSPACE, Keys.BACKSPACE)
    assert sitting.find("[data-choice=same]").get_attribute("aria-pressed") == "true"
    sitting.press(Keys.ARROW_UP)
    sitting.find("#stop").click()
    assert sitting.find("#status").text == "You have answered 5 of 8 questions."
    choices = [answer["choice"] for answer in sitting.exported()["answers"]]
    assert choices == ["first", "second", "first", "first", "second"]
    assert sitting.exported()["finished"] is False
    sitting.find("#resume").click()
    assert sitting.shown()["where"] == "6 of 8"


def reload(driver):
    """Until the new page's script has run."""
    driver.execute_script("window.old = true")
    driver.refresh()
    WebDriverWait(driver, 60).until(
        lambda _: driver.execute_script("return !window.old && document.readyState === 'complete'")
    )


def test_a_reload_loses_nothing(person, chromium):
    sitting = person("reload")
    sitting.begin()
    sitting.press("1", "2", "1")
    before = sitting.shown()
    reload(chromium)
    assert sitting.shown() == before
    sitting.answer_all(0, count=5)
    answers = sitting.exported()["answers"]
    reload(chromium)
    assert sitting.exported()["answers"] == answers
    assert [answer["choice"] for answer in answers[:3]] == ["first", "second", "first"]
    assert [answer["position"] for answer in answers] == list(range(8))


def test_where_nothing_is_kept_the_page_says_so(person, chromium):
    sitting = person("private")
    chromium.execute_script("Storage.prototype.setItem = () => { throw new DOMException('no', 'QuotaExceededError'); }")
    sitting.begin()
    assert sitting.find("#unkept").is_displayed()
    sitting.answer_all(0)
    assert len(sitting.exported()["answers"]) == 8


def test_order_and_sides_are_each_participants_own(person, key):
    """Every item comes once; over participants each picture stands on either side, and first places vary."""
    orders, sides = [], Counter()
    for at in range(12):
        sitting = person(f"p{at}")
        sitting.begin()
        sitting.press(*"11111111")
        content = sitting.exported()
        orders.append(tuple(answer["item"] for answer in content["answers"]))
        sides.update(answer["first"] == key["items"][answer["item"]]["pictures"][0] for answer in content["answers"])
        assert sorted(orders[-1]) == sorted(key["items"])
    # Of 8! orders and 8 first places at random; fewer than these come once in some 300,000 runs.
    assert len(set(orders)) >= 11
    assert len({order[0] for order in orders}) >= 3
    assert 25 < sides[True] < 71  # of 96; a fair coin leaves this once in 300,000 times


def test_the_next_participant_begins_anew(person, chromium, folder):
    sitting = person("")
    own = sitting.find("#participant").get_attribute("value")
    sitting.find("#participant").clear()
    sitting.find("#participant").send_keys("  Zoë / 7 ")
    sitting.begin()
    sitting.answer_all(0)
    before = sitting.exported()
    assert before["participant"] == "Zoë / 7"
    sitting.find("#next").click()
    chromium.switch_to.alert.dismiss()
    assert sitting.exported() == before
    sitting.find("#next").click()
    chromium.switch_to.alert.accept()
    assert sitting.find("#participant").get_attribute("value") not in ("", own, "Zoë / 7")
    sitting.begin()
    sitting.find("#stop").click()
    assert sitting.exported()["answers"] == []
    assert sitting.exported()["seed"] != before["seed"]


def test_hostile_prompts_are_text(person, chromium):
    sitting = person("hostile")
    sitting.begin()
    prompts = set()
    for _ in range(8):
        prompts.add(sitting.shown()["prompt"])
        sitting.press("1")
    assert HOSTILE in prompts
    assert chromium.execute_script("return document.querySelectorAll('img').length") == 2


def test_everything_has_a_name_and_changes_are_said(person, chromium):
    sitting = person("aria")
    sitting.begin()
    names = chromium.execute_script(
        "return [...document.querySelectorAll('#ask button, #ask img, #ask progress')].map((e) => "
        "e.textContent.trim() || e.alt || document.getElementById(e.getAttribute('aria-labelledby')).textContent)"
    )
    assert len(names) == 9
    assert all(names)
    assert sitting.find("#said").get_attribute("role") == "status"
    assert sitting.find("#said").get_attribute("textContent") == "Question 1 of 8"
    assert chromium.switch_to.active_element.get_attribute("id") == "question"
    sitting.press("1")
    assert sitting.find("#said").get_attribute("textContent") == "Question 2 of 8"
    assert sitting.find("#progress").get_attribute("value") == "1"


def test_a_phone_shows_both_whole_and_enlarges_them_together(person, chromium):
    show_on(chromium, PHONE, touch=True)
    sitting = person("phone")
    sitting.begin()
    WebDriverWait(chromium, 60).until(
        lambda _: all(sitting.find(side).size["height"] > 30 for side in ("#first", "#second"))
    )
    width, height = PHONE
    assert chromium.execute_script("return document.scrollingElement.scrollWidth") <= width
    for side in ("first", "second"):
        box = sitting.find(f"#{side}").rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["width"] / box["height"] == pytest.approx(6, rel=0.05)
    for button in chromium.find_elements(By.CSS_SELECTOR, "[data-choice]"):
        assert button.rect["height"] >= 44
        assert button.rect["y"] + button.rect["height"] <= height
    sitting.find("#size").click()
    assert sitting.find("#first").rect["height"] > 200
    chromium.execute_script("document.querySelector('.strip').scrollLeft = 300")
    scrolled = "return [...document.querySelectorAll('.strip')].map((strip) => Math.round(strip.scrollLeft))"
    WebDriverWait(chromium, 60).until(lambda _: chromium.execute_script(scrolled) == [300, 300])
    assert chromium.execute_script("return document.scrollingElement.scrollWidth") <= width


def test_tall_panoramas_stand_side_by_side_and_without_ties(person, chromium, tmp_path):
    roots = [make_dataset(tmp_path / name, shade, size=(384, 64), samples=1) for name, shade in (("a", 40), ("b", 90))]
    make_study(roots, tmp_path / "study", Design(pairs=2, controls=0))
    sitting = person("tall", tmp_path / "study")
    sitting.begin()
    pair = sitting.find("#pair")
    WebDriverWait(chromium, 60).until(lambda _: "tall" in pair.get_attribute("class"))
    first, second = sitting.find("#first").rect, sitting.find("#second").rect
    assert first["x"] + first["width"] <= second["x"]
    assert abs(first["y"] - second["y"]) < 2
    assert second["y"] + second["height"] < 800
    assert not sitting.find("[data-choice=same]").is_displayed()
    sitting.press("0")
    assert sitting.shown()["where"] == "1 of 2"
