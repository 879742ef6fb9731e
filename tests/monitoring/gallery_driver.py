"""Find and use parts of the gallery's page in a browser."""

from forks import WAIT_S
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


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
