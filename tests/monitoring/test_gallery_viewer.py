"""The viewer of the gallery in headless Chromium: pan, zoom, turn; originals; on a phone."""

import math

import pytest
from browser import PHONE, show_on
from gallery_dataset import add_shard, encoded, new_dataset
from gallery_driver import by_id, drag, first_card, picture_box, press, shift_and, text, until
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from madgen.monitoring import gallery

WIDE, HIGH = 720, 120


def wheel_of_colours():
    """A picture that closes: pixel column x has red, green and blue of a phase of x, and no step anywhere."""
    row = bytes(
        round(127.5 + 127 * math.cos(2 * math.pi * (x / WIDE - shift / 3))) for x in range(WIDE) for shift in range(3)
    )
    return Image.frombytes("RGB", (WIDE, HIGH), row * HIGH)


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """One picture that closes and one that does not; the page embeds thumbnails alone."""
    directory = new_dataset(tmp_path_factory.mktemp("gallery") / "loops")
    picture, size = [encoded(wheel_of_colours())], {"width": WIDE, "height": HIGH}
    add_shard(directory, 0, ["around"], pictures=picture, loop=True, keys=["k" * 96 + "-0000"], **size)
    add_shard(directory, 1, ["straight"], pictures=picture, **size)
    gallery.write_gallery(directory, directory / "thumbnails.html", budget=0)
    return gallery.write_gallery(directory)


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
