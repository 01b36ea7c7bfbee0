"""The page in a browser, in front of a real server with the built-in model: what people do with it first."""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request

import pytest
from browsing import AUDIT, SLOW_MS, chromium, opened

PROMPT = "a red circle moving left on a white background"
LONG = 200  # steps: enough to be cancelled in between


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened_browser:
        yield opened_browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of `frameloom serve` with the built-in model, when it can take a job."""
    command = [sys.executable, "-m", "frameloom", "serve", "--port", "0", "--grace", "1s"]
    data = tmp_path_factory.mktemp("serve") / "data"
    with subprocess.Popen([*command, "--data-dir", data], stdout=subprocess.PIPE, text=True) as process:
        try:
            found = next(re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout if "http://" in line)
            rest = threading.Thread(target=process.stdout.read)  # so that it never waits for a reader
            rest.start()
            yield found[0]
        finally:
            process.terminate()
            process.wait(60)
            rest.join()


def ready(page):
    page.wait_for_function("() => document.querySelector('#form.ready') && document.querySelector('#banner').hidden")


def ask(page, prompt=PROMPT, *, frames=9, steps=8):
    ready(page)
    page.fill("#num_frames", str(frames))
    page.locator("#steps").fill(str(steps))
    page.fill("#prompt", prompt)
    before = page.evaluate("location.hash")
    page.press("#prompt", "Enter")
    page.wait_for_function("(before) => location.hash !== before", arg=before)
    page.wait_for_function("(text) => document.querySelector('#stage .prompt')?.textContent === text", arg=prompt)


def done(page):
    page.wait_for_selector("#stage video[src]")


def test_a_video_is_watched_to_its_end_and_played(browser, address):
    with opened(browser, address) as page:
        page.evaluate("""() => {
          window.seen = [];
          new MutationObserver(() => {
            const bar = document.querySelector("#stage progress");
            const picture = document.querySelector("#stage .preview");
            if (bar) window.seen.push([bar.value, document.querySelector("#stage .now").textContent,
              picture && !picture.hidden ? picture.naturalWidth : 0]);
          }).observe(document.querySelector("#stage"), { subtree: true, childList: true, attributes: true });
        }""")
        ask(page, steps=25, frames=17)
        done(page)
        page.wait_for_function("() => document.querySelector('#stage video').currentTime > 0.2")
        shown = page.evaluate("(({videoWidth: w, duration: d}) => [w, d])(document.querySelector('#stage video'))")
        assert shown[0] == 64
        assert 2 <= shown[1] <= 2.3  # 17 frames, 8 each second
        seen = page.evaluate("window.seen")
        shares = [value for value, _, _ in seen]
        assert shares == sorted(shares), "progress goes one way"
        assert len({value for value in shares if 0 < value < 100}) >= 3
        assert any(re.search(r"Drawing, \d+ of 25", now) for _, now, _ in seen)
        assert "17 frames" in page.inner_text("#stage .facts")
        assert page.inner_text("#announce") == "The video is done."
        page.wait_for_selector("#cards .card img")


def test_a_reload_loses_neither_videos_nor_what_was_typed(browser, address):
    with opened(browser, address) as page:
        ask(page)
        done(page)
        cards = page.locator(".card").count()
        page.fill("#prompt", "a draft that is not sent")
        page.fill("#num_frames", "13")
        page.locator("summary").click()
        page.fill("#negative_prompt", "text")
        page.reload()
        ready(page)
        done(page)
        assert page.locator(".card").count() == cards
        assert page.inner_text("#stage .prompt") == PROMPT
        assert page.input_value("#prompt") == "a draft that is not sent"
        assert page.input_value("#num_frames") == "13"
        assert page.input_value("#negative_prompt") == "text"
        with page.expect_download() as download:
            page.get_by_role("button", name="Download").click()
        assert download.value.suggested_filename == "a-red-circle-moving-left-on-a-white-background.mp4"


def test_a_running_video_is_cancelled_and_a_waiting_one_never_starts(browser, address):
    with opened(browser, address) as page:
        ask(page, "a blue star spinning", steps=LONG, frames=33)
        ask(page, "a green square growing")
        page.wait_for_selector("#stage .now:has-text('in line'), #stage .now:has-text('before it')")
        page.locator("#stage").get_by_role("button", name="Cancel").click()
        page.wait_for_selector("#stage .problem:has-text('Cancelled before it was done')")
        page.locator(".card", has_text="a blue star spinning").first.click()
        page.wait_for_function("() => document.querySelector('#stage progress')?.value > 0")
        page.locator("#stage").get_by_role("button", name="Cancel").click()
        page.wait_for_selector("#stage .problem:has-text('Cancelled before it was done')")
        page.get_by_role("button", name="Try again").click()
        assert page.input_value("#prompt") == "a blue star spinning"
        assert page.input_value("#num_frames") == "33"
        assert page.locator("input[name=seeds]:checked").get_attribute("value") == "fixed"


def test_the_keyboard_is_enough(browser, address):
    with opened(browser, address) as page:
        ready(page)

        def tab_to(selector):
            for _ in range(120):
                if page.evaluate("(selector) => document.activeElement?.matches(selector)", selector):
                    return page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                page.keyboard.press("Tab")
            raise AssertionError(f"{selector} is not reached")

        tab_to("#prompt")
        page.keyboard.type("a purple cross rising")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("on a white background")
        tab_to("#length")
        page.keyboard.press("Home")
        tab_to("#steps")
        page.keyboard.press("Home")
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        assert page.input_value("#steps") == "5"
        assert page.input_value("#num_frames") == "1"
        for _ in range(2):
            page.locator("#length").press("ArrowRight")
        assert page.input_value("#num_frames") == "9"
        page.keyboard.press("Control+Enter")
        page.wait_for_function(
            "() => document.querySelector('#stage .prompt')?.textContent.startsWith('a purple cross')"
        )
        done(page)
        before = page.locator(".card").count()
        assert tab_to("#cards .card") == "solid"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "stage"
        tab_to("#stage .actions button:last-child")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "ask-no"
        page.keyboard.press("Escape")
        page.wait_for_function("() => document.activeElement.textContent === 'Delete'")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_function("(count) => document.querySelectorAll('.card').length === count", arg=before - 1)
        assert page.evaluate("document.activeElement.matches('.card, #prompt')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out(browser, address, scheme):
    with opened(browser, address, color_scheme=scheme) as page:
        ask(page)
        done(page)
        page.wait_for_selector("#cards .card img")
        page.locator("summary").click()
        assert page.evaluate(AUDIT) == []
        page.get_by_role("button", name="Delete").click()
        assert page.evaluate(AUDIT) == []


@pytest.mark.parametrize("width", [320, 360, 768])
def test_narrow_screens_have_all_of_it_and_nothing_sideways(browser, address, width):
    with opened(browser, address, viewport={"width": width, "height": 740}) as page:
        ask(page)
        done(page)
        page.locator("summary").click()
        page.locator("input[value=own]").check()
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1] == width
        small = page.evaluate("""[...document.querySelectorAll("button, select, summary, input[type=number]")]
          .filter((element) => element.checkVisibility() && !element.closest("[hidden]"))
          .map((element) => [element.id || element.textContent, element.getBoundingClientRect()])
          .filter(([, box]) => box.height < 20 || box.right > innerWidth || box.left < 0).map(([id]) => id)""")
        assert small == []


def test_what_it_takes_is_told_before_and_numbers_are_made_to_fit(browser, address):
    with opened(browser, address) as page:
        ready(page)
        page.wait_for_function("() => /about .+ of memory/.test(document.querySelector('#forecast').textContent)")
        page.locator("input[value=own]").check()
        page.fill("#width", "70")
        page.fill("#num_frames", "12")
        page.locator("#prompt").focus()
        assert page.input_value("#width") == "64"
        assert page.input_value("#num_frames") == "13"
        page.fill("#width", "8192")
        page.fill("#height", "8192")
        page.fill("#num_frames", "33")
        page.fill("#prompt", PROMPT)
        page.press("#prompt", "Enter")
        page.wait_for_selector("#error-size:not(:empty), #error-num_frames:not(:empty), #error-form:not(:empty)")


@pytest.mark.slow
def test_copied_commands_make_the_same_video(browser, address, tmp_path):
    with opened(browser, address, permissions=["clipboard-read", "clipboard-write"]) as page:
        ask(page, "a star, it's yellow & growing")
        done(page)
        video = page.url.split("#")[1]
        page.get_by_role("button", name="Copy as command").click()
        page.wait_for_selector("#toast:has-text('clipboard')")
        command = shlex.split(page.evaluate("navigator.clipboard.readText()"))
        page.get_by_role("button", name="Copy as curl").click()
        page.wait_for_selector("#toast:has-text('curl')")
        curl = shlex.split(page.evaluate("navigator.clipboard.readText()"))
        assert command[:2] == ["frameloom", "generate"]
        subprocess.run([sys.executable, "-m", *command, "--quiet"], cwd=tmp_path, check=True, timeout=SLOW_MS / 1000)
        with urllib.request.urlopen(f"{address}/v1/videos/{video}/content") as answer:
            served = hashlib.sha256(answer.read()).hexdigest()
        assert hashlib.sha256((tmp_path / f"{video}.mp4").read_bytes()).hexdigest() == served
        assert curl[0] == "curl"
        if shutil.which("curl"):
            told = subprocess.run(
                [*curl, "--silent", "--noproxy", "*"], capture_output=True, text=True, check=True
            ).stdout
            assert '"status":"queued"' in told.replace(" ", "")
