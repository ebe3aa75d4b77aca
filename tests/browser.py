"""A headless Chromium for the tests of pages: shows a page, points at places of it, keeps the errors of its script."""

import os
import shutil
from pathlib import Path

import pytest


try:  # where the tests of a GPU run it may be missing
    from selenium import webdriver
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.by import By
except ModuleNotFoundError:
    webdriver = None


PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class Browser:
    def __init__(self, program: str, driver: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))

    def show(self, path: Path, width: int = 1280, scheme: str = "light") -> None:
        """Open a file in a window of that width (pixels), for a reader who prefers `scheme`: light | dark."""
        screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        self.driver.get(path.absolute().as_uri())

    def errors(self) -> list[str]:
        """What the console has of errors since the last call: exceptions, and what the page may not load."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """As the reader sees it: nothing of what is hidden."""
        return self.find(selector)[0].text

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is in the window, which scrolls to it; pixels: left, right, top, bottom."""
        script = "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
        return self.run(f"{script} return e.getBoundingClientRect().toJSON();", selector)

    def point(self, x: float, y: float, click: bool = False, drag_to: float | None = None) -> None:
        """Move the pointer to a place of the window; then click, or drag to another x."""
        actions = ActionBuilder(self.driver, duration=0)
        pointer = actions.pointer_action
        pointer.move_to_location(round(x), round(y))
        if click:
            pointer.click()
        if drag_to is not None:
            pointer.pointer_down()
            pointer.move_to_location(round(drag_to), round(y))
            pointer.pointer_up()
        actions.perform()


def start_browser() -> Browser:
    """Skips the test where there is no browser; in CI it fails."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    driver = shutil.which("chromedriver")
    if None in (program, driver, webdriver):
        reason = "no browser for the tests of pages: apt-get install chromium chromium-driver, pip install selenium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return Browser(program, driver)
