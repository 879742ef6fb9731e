"""The gallery in headless Chromium: filter, sort, pan, turn; by mouse, keyboard and touch."""

import math

import pytest
from browser import PHONE, show_on
from forks import WAIT_S
from gallery_dataset import HOSTILE, SEED, add_shard, encoded, new_dataset
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from madgen.monitoring import gallery

MANY = 150
WIDE, HIGH = 720, 120


def wheel_of_colours():
    """A picture that closes: pixel column x has red, green and blue of a phase of x, and no step anywhere."""
    row = bytes(
        round(127.5 + 127 * math.cos(2 * math.pi * (x / WIDE - shift / 3))) for x in range(WIDE) for shift in range(3)
    )
    return Image.frombytes("RGB", (WIDE, HIGH), row * HIGH)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Hostile prompts, scores of some, and many more samples."""
    directory = new_dataset(tmp_path_factory.mktemp("gallery") / "data", name="<i>job</i>")
    prompts = [HOSTILE, "Hills at Noon", "hills at night", "the sea"]
    scores = [{"seam": 1.5}, {"seam": 1.1, "coherence": 0.5}, {"coherence": 0.9}, {"seam": 1.2, "coherence": 0.7}]
    add_shard(directory, 0, prompts, scores=scores)
    add_shard(directory, 1, [f"filler {number}" for number in range(MANY)], width=64, height=16)
    return gallery.write_gallery(directory)


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """One picture that closes and one that does not; the page embeds thumbnails alone."""
    directory = new_dataset(tmp_path_factory.mktemp("gallery") / "loops")
    picture, size = [encoded(wheel_of_colours())], {"width": WIDE, "height": HIGH}
    add_shard(directory, 0, ["around"], pictures=picture, loop=True, keys=["k" * 96 + "-0000"], **size)
    add_shard(directory, 1, ["straight"], pictures=picture, **size)
    gallery.write_gallery(directory, directory / "thumbnails.html", budget=0)
    return gallery.write_gallery(directory)


@pytest.fixture
def visit(chromium):
    """Opens a page; in the end nothing has been refused, has failed, or has been asked of a network."""

    def go(path):
        chromium.get(path.as_uri())
        return chromium

    yield go
    assert [said for said in chromium.get_log("browser") if said["level"] == "SEVERE"] == []
    names = chromium.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(("data:", "blob:")) for name in names), names


def cards(driver):
    """Keys of the cards in view, in the order of the screen."""
    return driver.execute_script("""
        return [...document.querySelectorAll('.card')].map((card) => [card.getBoundingClientRect(), card])
          .filter(([box]) => box.bottom > 0 && box.top < innerHeight)
          .sort(([a], [b]) => a.top - b.top || a.left - b.left)
          .map(([, card]) => card.querySelector('.name').textContent);""")


def until(driver, condition):
    return WebDriverWait(driver, WAIT_S, poll_frequency=0.02).until(lambda _: condition())


def by_id(driver, name):
    return driver.find_element(By.ID, name)


LISTEN = """
window.said = [];
new MutationObserver(() => window.said.push(arguments[0].textContent)).observe(arguments[0], {childList: true});
"""


def text(driver, name):
    return driver.execute_script("return document.getElementById(arguments[0]).textContent", name)


def press(driver, *keys):
    ActionChains(driver).send_keys(*keys).perform()


def shift_and(driver, key):
    ActionChains(driver).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()


def drag(driver, by_x, by_y):
    ActionChains(driver, duration=20).drag_and_drop_by_offset(by_id(driver, "stage"), by_x, by_y).perform()


def first_card(driver):
    return driver.find_element(By.CSS_SELECTOR, ".card")


def picture_box(driver):
    """Left, top, width and height of the picture in the viewer, in CSS pixels of the page."""
    return driver.execute_script(
        "const box = document.getElementById('picture').getBoundingClientRect();"
        "return [box.left, box.top, box.width, box.height]"
    )


def test_hostile_prompts_are_shown_as_text(visit, page):
    driver = visit(page)
    assert driver.title == "<i>job</i> · madgen"
    assert driver.find_element(By.TAG_NAME, "h1").text == "<i>job</i>"
    shown = driver.execute_script("return document.querySelector('.card .prompt').textContent")
    first_card(driver).click()
    assert shown == text(driver, "lead") == HOSTILE
    assert driver.execute_script("return document.querySelectorAll('[onerror]').length") == 0
    assert driver.title == "<i>job</i> · madgen"


def test_foreign_scripts_and_styles_are_blocked(chromium, page):
    """Were a prompt ever to become markup, the page's policy would still not let it run, load or dress anything."""
    chromium.get(page.as_uri())
    title = chromium.title
    chromium.execute_script("""
        const script = document.createElement('script');
        script.textContent = "document.title = 'hacked'";
        const markup = document.createElement('p');
        markup.innerHTML = '<img src="http://localhost/x.png" onerror="document.title=1"><b style="color:red">x</b>';
        document.body.append(script, markup);""")
    refused = []

    def all_told():
        refused.extend(said["message"] for said in chromium.get_log("browser"))
        return all(any(word in message for message in refused) for word in ("inline script", "inline style", "x.png"))

    until(chromium, all_told)
    assert chromium.title == title


def test_filter_by_words_of_prompt_and_key(visit, page):
    driver = visit(page)
    assert cards(driver)[:5] == ["0000_00", "0000_01", "0000_02", "0000_03", "0001_00"]
    press(driver, "/", "HILLS night")
    until(driver, lambda: cards(driver) == ["0000_02"])
    assert text(driver, "count") == f"1 of {MANY + 4}"
    press(driver, Keys.ESCAPE)
    until(driver, lambda: text(driver, "count") == str(MANY + 4))
    for words, found in (("<script>", ["0000_00"]), ("'single' \"quoted\"", ["0000_00"]), ("0000_03", ["0000_03"])):
        press(driver, Keys.ESCAPE, words)
        until(driver, lambda found=found: cards(driver) == found)
    press(driver, Keys.ESCAPE, "nowhere")
    until(driver, lambda: by_id(driver, "none").is_displayed() and cards(driver) == [])


def test_sort_by_scores(visit, page):
    driver = visit(page)
    for order, first in {
        "seam best": ["0000_01", "0000_03", "0000_00", "0000_02", "0001_00"],  # the others have none: as they were
        "seam worst": ["0000_00", "0000_03", "0000_01", "0000_02", "0001_00"],
        "coherence best": ["0000_02", "0000_03", "0000_01", "0000_00", "0001_00"],
        "key": ["0000_00", "0000_01", "0000_02", "0000_03", "0001_00"],
        "prompt": ["0000_00", "0001_00", "0001_01", "0001_10", "0001_100"],
    }.items():
        driver.find_element(By.CSS_SELECTOR, f"#order option[value='{order}']").click()
        until(driver, lambda first=first: cards(driver)[:5] == first)
        shown = driver.execute_script("return document.querySelector('.card .foot').textContent")
        assert shown == {"seam best": "0000_01seam 1.1", "coherence best": "0000_02coherence 0.9"}.get(order, shown)
    names = [option.get_attribute("value") for option in driver.find_elements(By.CSS_SELECTOR, "#order option")]
    assert names == ["", "key", "prompt", "seam best", "seam worst", "coherence best", "coherence worst"]


def test_only_visible_cards_exist_and_all_are_reachable(visit, page):
    driver = visit(page)
    seen, height = set(), driver.execute_script("return document.body.scrollHeight")
    for top in range(0, height, 700):
        driver.execute_script("scrollTo(0, arguments[0])", top)
        driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        seen.update(cards(driver))
        assert len(driver.find_elements(By.CLASS_NAME, "card")) < MANY / 3
    assert len(seen) == MANY + 4


def test_keyboard_navigation_of_list_and_viewer(visit, page):
    driver = visit(page)

    def focused():
        return driver.execute_script("return document.activeElement.querySelector('.name')?.textContent")

    press(driver, "/", Keys.ARROW_DOWN)
    assert focused() == "0000_00"
    columns = driver.execute_script(
        "const tops = [...document.querySelectorAll('.cell')].map((cell) => cell.getBoundingClientRect().top);"
        "return tops.filter((top) => top === tops[0]).length"
    )
    press(driver, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert focused() == cards(driver)[columns]
    press(driver, Keys.END)
    assert focused() == f"0001_{MANY - 1:02d}"
    assert focused() in cards(driver)
    driver.execute_script("scrollTo(0, 0)")
    until(driver, lambda: "0000_00" in cards(driver))
    assert focused() == f"0001_{MANY - 1:02d}", "the card with the focus is not taken away"
    press(driver, Keys.ENTER, Keys.ARROW_LEFT)
    assert text(driver, "key") == f"0001_{MANY - 2:02d}"
    assert text(driver, "where") == f"{MANY + 3} / {MANY + 4}"
    press(driver, Keys.ESCAPE)
    until(driver, lambda: focused() == f"0001_{MANY - 2:02d}")
    assert focused() in cards(driver)
    assert len(driver.find_elements(By.CSS_SELECTOR, ".card[tabindex='0']")) == 1
    press(driver, "?")
    assert by_id(driver, "keys").is_displayed()
    press(driver, Keys.ESCAPE)
    assert not by_id(driver, "keys").is_displayed()


def test_themes(visit, page):
    driver = visit(page)

    def paper():
        colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        return int(colour.strip("rgba()").split(",")[0])

    assert paper() > 200
    press(driver, "t")
    assert paper() < 50
    press(driver, "t")
    assert paper() > 200
    show_on(driver, PHONE, touch=True, dark=True)
    visit(page)
    assert paper() < 50


def test_metadata_is_complete_and_can_be_copied(visit, page):
    driver = visit(page)
    first_card(driver).click()
    rows = driver.execute_script(
        "return [...document.querySelectorAll('#rows tr')].map((row) => [row.children[0].textContent, "
        "row.children[1].textContent])"
    )
    assert dict(rows) == {
        "key": "0000_00", "prompt": HOSTILE, "seed": str(SEED), "sampling.loop": "false", "sampling.sizes": "[64, 8]",
        "scores.seam": "1.5",
    }  # fmt: skip
    driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    command = f"madgen regenerate {page.parent} 0000_00 -o 0000_00.png"
    for copy, button, copied in (
        (lambda: press(driver, "c"), "copy-key", "0000_00"),
        (by_id(driver, "copy-command").click, "copy-command", command),
    ):
        driver.execute_script(LISTEN, by_id(driver, button))
        copy()
        until(driver, lambda: "Copied" in driver.execute_script("return window.said"))  # it says so for a moment
        assert driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == copied


def test_flat_view_pans_and_zooms(visit, page):
    driver = visit(page)
    first_card(driver).click()
    stage = by_id(driver, "stage")
    left, top, width, height = picture_box(driver)
    assert width == pytest.approx(stage.size["width"], abs=0.5)
    assert width / height == pytest.approx(4, rel=0.01)
    drag(driver, 100, 40)
    assert picture_box(driver) == pytest.approx([left, top, width, height], abs=0.5), "whole, it has nowhere to go"

    box = stage.rect
    x, y = box["x"] + box["width"] / 2 + 100, box["y"] + box["height"] / 2
    origin = ScrollOrigin.from_element(stage, 100, 0)
    for _ in range(4):
        ActionChains(driver, duration=0).scroll_from_origin(origin, 0, -200).perform()
    zoomed = picture_box(driver)
    assert zoomed[2] > 2 * width
    assert (x - zoomed[0]) / zoomed[2] == pytest.approx((x - left) / width, abs=0.002), (
        "what is under the pointer stays"
    )
    drag(driver, -60, 0)
    dragged = picture_box(driver)
    assert [dragged[0] - zoomed[0], dragged[2]] == pytest.approx([-60, zoomed[2]], abs=0.5)
    shift_and(driver, Keys.ARROW_LEFT)
    assert picture_box(driver)[0] - dragged[0] == pytest.approx(80, abs=0.5)
    drag(driver, 400, 0)
    for _ in range(8):
        drag(driver, 400, 0)
    assert picture_box(driver)[0] == pytest.approx(box["x"], abs=0.5), "its edge stops at the edge of the screen"
    press(driver, "0")
    assert picture_box(driver) == pytest.approx([left, top, width, height], abs=0.5)
    press(driver, "1")
    assert picture_box(driver)[2] == pytest.approx(640, abs=0.5)
    assert y == pytest.approx(picture_box(driver)[1] + 80, abs=1)


def heading(driver):
    return int(text(driver, "heading").removesuffix("°"))


def colours(driver, *fractions):
    """RGB of the 360° view at these fractions of its width, halfway up, once it has been drawn."""
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    return driver.execute_script(
        "const canvas = document.getElementById('canvas'), { width, height } = canvas;"
        "const pen = new OffscreenCanvas(width, 1).getContext('2d', { willReadFrequently: true });"
        "pen.drawImage(canvas, 0, -Math.floor(height / 2));"
        "return [...arguments].map((x) => [...pen.getImageData(x * width, 0, 1, 1).data].slice(0, 3))",
        *fractions,
    )


def degrees(colour):
    """The angle whose colour in `wheel_of_colours` this is, 0..360."""
    waves = [complex(math.cos(2 * math.pi * n / 3), math.sin(2 * math.pi * n / 3)) for n in range(3)]
    total = sum(value * wave for value, wave in zip(colour, waves, strict=True))
    return math.degrees(math.atan2(total.imag, total.real)) % 360


def test_360_view_turns_endlessly(visit, loop):
    driver = visit(loop)
    until(driver, lambda: len(driver.find_elements(By.CSS_SELECTOR, ".card img")) == 2)
    assert [badge.text for badge in driver.find_elements(By.CLASS_NAME, "badge")] == ["360°"]
    first_card(driver).click()
    press(driver, "3")
    stage = by_id(driver, "stage")
    assert by_id(driver, "canvas").is_displayed()
    assert not by_id(driver, "picture").is_displayed()
    until(driver, lambda: max(colours(driver, 0.5)[0]) > 150)

    # A flat screen before a cylinder of radius W / 2π that fills its height: column x shows the angle atan(x / F).
    width, height = stage.size["width"], stage.size["height"]
    focal = height * WIDE / (2 * math.pi) / HIGH
    for x, colour in zip((0.1, 0.3, 0.5, 0.75, 0.95), colours(driver, 0.1, 0.3, 0.5, 0.75, 0.95), strict=True):
        expected = 180 + math.degrees(math.atan((x - 0.5) * width / focal))
        assert degrees(colour) == pytest.approx(expected, abs=1.5)

    turned, step = 0.0, math.degrees(350 / focal)
    around = math.ceil(360 / step)
    for by in [350] * around + [-350] * 2 * around:  # over the place where it closes, both ways
        drag(driver, by, 0)
        turned -= math.copysign(step, by)
        (middle,) = colours(driver, 0.5)
        off = (degrees(middle) - 180 - turned + 180) % 360 - 180
        assert abs(off) < 2, (degrees(middle), turned)
        assert abs((heading(driver) - 180 - turned + 180) % 360 - 180) < 1.5
    shift_and(driver, Keys.ARROW_LEFT)
    colours(driver, 0.5)
    back = heading(driver)
    assert abs((back - 180 - turned + math.degrees(80 / focal) + 180) % 360 - 180) < 1.5

    press(driver, " ")
    until(driver, lambda: heading(driver) != back)
    press(driver, " ")
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    rested = heading(driver)
    driver.execute_async_script("setTimeout(arguments[0], 150)")
    assert heading(driver) == rested

    press(driver, Keys.ARROW_RIGHT)
    assert text(driver, "lead") == "straight"
    assert not by_id(driver, "around").is_displayed(), "what does not close has no 360° view"
    assert by_id(driver, "picture").is_displayed()


def test_original_is_read_from_an_opened_shard(visit, loop):
    """A page of thumbnails says so, and shows the original once the reader opens the tar; also of a very long key."""
    driver = visit(loop.with_name("thumbnails.html"))
    first_card(driver).click()

    def natural():
        return driver.execute_script("return document.getElementById('picture').naturalWidth")

    until(driver, lambda: natural() == 128 * WIDE // HIGH or natural() == WIDE)
    assert "only the thumbnail" in text(driver, "note-text")
    assert f"{'k' * 96}-0000.png in shards/job-000000.tar" in text(driver, "note-text")
    source = driver.execute_script("return document.getElementById('picture').src")
    by_id(driver, "shards").send_keys(str(loop.parent / "shards/job-000000.tar"))
    until(driver, lambda: not by_id(driver, "note").is_displayed())
    until(driver, lambda: natural() == WIDE)
    assert driver.execute_script("return document.getElementById('picture').src") != source
    press(driver, Keys.ARROW_RIGHT)
    assert "only the thumbnail" in text(driver, "note-text")
    wrong = loop.parent / "elsewhere" / "job-000001.tar"
    wrong.parent.mkdir()
    wrong.write_bytes(b"x" * 9000)
    by_id(driver, "shards").send_keys(str(wrong))
    until(driver, lambda: "does not contain 0001_00.png" in text(driver, "note-text"))


def touch(driver, kind, *points):
    driver.execute_cdp_cmd(
        "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y, "id": n} for n, (x, y) in points]}
    )


def check_bar(driver):
    """All buttons stand in one line, large enough for a finger."""
    assert driver.execute_script("return document.documentElement.scrollWidth") == PHONE[0]
    boxes = driver.execute_script(
        "return [...document.querySelectorAll('.bar button')].map((button) => button.getBoundingClientRect())"
        ".filter((box) => box.width).map((box) => [box.left, box.right, box.top, box.height])"
    )
    assert len({top for *_, top, _ in boxes}) == 1
    assert all(left >= 0 and right <= PHONE[0] and height >= 36 for left, right, _, height in boxes)


def test_layout_on_a_phone(visit, loop, page):
    driver = visit(page)
    show_on(driver, PHONE, touch=True)
    visit(page)
    assert driver.execute_script("return document.documentElement.scrollWidth") == PHONE[0]
    lefts = driver.execute_script(
        "return [...new Set([...document.querySelectorAll('.cell')].map((cell) => cell.getBoundingClientRect().left))]"
    )
    assert len(lefts) == 1
    box = first_card(driver).rect
    at = [(0, (box["x"] + 50, box["y"] + 20))]
    touch(driver, "touchStart", *at)
    touch(driver, "touchEnd")
    until(driver, lambda: by_id(driver, "viewer").is_displayed())
    check_bar(driver)
    width = picture_box(driver)[2]
    stage = by_id(driver, "stage").rect
    middle = stage["y"] + stage["height"] / 2
    touch(driver, "touchStart", (0, (150, middle)), (1, (240, middle)))
    touch(driver, "touchMove", (0, (105, middle)), (1, (285, middle)))
    touch(driver, "touchEnd")
    until(driver, lambda: picture_box(driver)[2] > 1.5 * width)
    pinched = picture_box(driver)
    assert pinched[2] == pytest.approx(2 * width, rel=0.02), "fingers twice as far apart show it twice as large"
    touch(driver, "touchStart", (0, (200, middle)))
    touch(driver, "touchMove", (0, (150, middle)))
    touch(driver, "touchEnd")
    until(driver, lambda: picture_box(driver)[0] - pinched[0] == pytest.approx(-50, abs=1))

    visit(loop)
    first_card(driver).click()
    check_bar(driver)
    by_id(driver, "around").click()
    until(driver, lambda: max(colours(driver, 0.5)[0]) > 150)
    touch(driver, "touchStart", (0, (200, middle)))
    touch(driver, "touchMove", (0, (100, middle)))
    touch(driver, "touchEnd")
    until(driver, lambda: 181 < heading(driver) < 300)
