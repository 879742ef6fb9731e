"""The gallery in headless Chromium: filter, sort, pan, turn; by mouse, keyboard and touch."""

from browser import PHONE, show_on
from gallery_dataset import HOSTILE, MANY, SEED
from gallery_driver import LISTEN, by_id, cards, first_card, press, text, until
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys


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
