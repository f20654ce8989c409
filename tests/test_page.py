"""The chat page in headless Chromium: a conversation, the keyboard, a phone. SHOTS=DIR keeps pictures."""
import contextlib
import os
import re
import shutil

import pytest

from tests.fake_engine import FakeEngine, make_served
from tests.test_server import running, until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
QUESTION = "Why is it neither Lyon nor the lovely town of Besançon?"


@pytest.fixture(scope="module", name="browser")
def open_browser():
  api = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
  if CHROMIUM is None:
    pytest.skip("needs chromium")
  with api.sync_playwright() as p:
    browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


@contextlib.contextmanager
def opened(browser, server, size="desktop", scheme="light", expected=()):
  """The page, which says nothing on the console but what is expected, and asks nobody else."""
  width, height = SIZES[size]
  context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme,
                                has_touch=size == "phone", permissions=["clipboard-read", "clipboard-write"])
  page, said, asked = context.new_page(), [], []
  page.on("console", lambda message: said.append(message.text))
  page.on("pageerror", lambda error: said.append(str(error)))
  page.on("request", lambda request: asked.append(request.url))
  page.goto(f"http://127.0.0.1:{server.port}/")
  yield page
  assert [s for s in said if not any(e in s for e in expected)] == []
  assert all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in asked)
  assert page.evaluate("document.documentElement.scrollWidth") == width
  shoot(page)
  context.close()


def shoot(page, more=""):
  if "SHOTS" in os.environ:
    name = re.sub("[^a-z_]+", "-", os.environ["PYTEST_CURRENT_TEST"])
    page.screenshot(path=f"{os.environ['SHOTS']}/{name}{more}.png")


def visible(character):
  return "·" if character == " " else character


def say(page, text):
  page.get_by_label("Message", exact=True).fill(text)
  page.keyboard.press("Enter")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_conversation(browser, size, scheme):
  with running(FakeEngine(delay=0.003), make_served(max_length=2000)) as server, \
       opened(browser, server, size, scheme) as page:
    if size == "phone":
      page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("0")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("System message").fill("Be brief.")
    if size == "phone":
      page.get_by_role("button", name="Done").click()
    say(page, QUESTION)
    page.get_by_role("button", name="Again").wait_for()
    assert page.locator(".assistant .said").inner_text() == QUESTION
    say(page, "And\nnow?")
    until(lambda: page.locator(".assistant .foot").count() == 2)
    assert page.locator(".assistant .said").nth(1).inner_text() == "And\nnow?"
    got = server.engine.requests[-1].sampling
    assert (got.seed, got.top_k, got.temperature, got.top_p, got.logprobs, got.max_tokens) == (
      0, 7, 0.7, 0.95, 5, 512)
    assert page.locator("#news").text_content() == "And\nnow?"  # What a screen reader says.
    page.get_by_role("button", name="Again").click()
    until(lambda: len(server.engine.requests) == 3 and not server.engine.has_work)
    assert page.locator(".user").count() == page.locator(".assistant").count() == 2
    tokens = page.locator(".assistant .t")
    tokens.nth(3).tap() if size == "phone" else tokens.nth(3).hover()
    assert page.locator("#peek tr").count() == 5
    assert page.locator("#peek tr.on td").first.inner_text() == visible(QUESTION[3])
    box = page.locator("#peek").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= SIZES[size][0] and box["y"] >= 0
    shoot(page, "peek")
    page.get_by_role("button", name="Copy").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == QUESTION
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0 and page.get_by_text("Ask it something").is_visible()


def test_the_keyboard_does_everything(browser):
  with running(FakeEngine(delay=0.02), make_served(max_length=2000)) as server, \
       opened(browser, server) as page:
    assert page.evaluate("document.activeElement.id") == "text"
    until(lambda: page.title() == "fake")
    page.keyboard.type("x" * 100)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("y")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    until(lambda: page.locator(".t").count() > 5)
    page.keyboard.press("Escape")
    page.get_by_text("stopped by you").wait_for()
    until(lambda: not server.engine.has_work)  # The engine has stopped too.
    n = page.locator(".t").count()
    assert 5 < n < 102 and page.locator(".user .said").inner_text() == "x" * 100 + "\ny"
    page.locator(".t[tabindex='0']").focus()
    assert page.locator("#peek").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('.t')].indexOf(document.activeElement)") == 1
    assert page.locator(".t[tabindex='0']").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#peek").is_hidden()
    say(page, "z")  # What was answered so far is part of the conversation.
    until(lambda: page.locator(".assistant .foot").count() == 2)


def test_a_model_without_a_template_continues_texts(browser):
  with running(FakeEngine(delay=0.002), make_served(chat=None, max_length=2000)) as server, \
       opened(browser, server, "phone") as page:
    page.get_by_text("Begin a text").wait_for()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("System message").is_hidden()
    page.get_by_label("Seed").fill("0")
    page.get_by_role("button", name="Done").click()
    say(page, "Once upon 🦜")
    page.get_by_role("button", name="Again").wait_for()
    assert page.locator(".said").inner_text() == "Once upon 🦜Once upon 🦜"


def test_faults_are_told(browser):
  served = make_served(max_length=2000)
  with running(FakeEngine(), served) as server, opened(browser, server, expected=("400",)) as page:
    say(page, "refuse me")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == "chat template: no"
    page.get_by_label("Top-k").fill("0")
    say(page, "hello")
    assert len(server.engine.requests) == 0 and page.locator(".user").count() == 1
    page.get_by_label("Top-k").fill("")
    page.get_by_label("Seed").fill("0")
    say(page, "<img src=x onerror=alert(1)>&amp;")
    page.get_by_role("button", name="Again").wait_for()
    assert page.locator(".assistant .said").inner_text() == "<img src=x onerror=alert(1)>&amp;"
    assert page.locator("img").count() == 0


def test_a_key_is_asked_for(browser):
  with running(FakeEngine(), make_served(), key="k" * 20) as server, \
       opened(browser, server, expected=("401",)) as page:
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("that was not it").wait_for()
    page.get_by_label("API key").fill("k" * 20)
    page.keyboard.press("Enter")
    until(lambda: page.title() == "fake")
    page.reload()
    until(lambda: page.title() == "fake")
