"""The page in a browser, in front of real routes whose service does as the test wishes: full, ending, failing, gone."""

import io
import json
import shlex
import shutil
import subprocess
import urllib.request
from pathlib import Path

import msgspec
import pytest
import typer
from browsing import AUDIT, chromium, opened
from memory_service import MemoryService, served
from PIL import Image

from frameloom.cli.app import app
from frameloom.serve.config import Key, ServeConfig
from frameloom.serve.jobs.job import Ask, Job, JobError
from frameloom.serve.service import RefusedError, Standing

SECRET = "a-secret-of-alice-0123456789"
GUIDE = Path(__file__).parents[2] / "docs" / "serve.md"
HOSTILE = '<img src=x onerror=alert(1)><b>bold</b> & "quoted"'


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened_browser:
        yield opened_browser


@pytest.fixture
def service(tmp_path):
    return MemoryService(tmp_path)


@pytest.fixture
def address(service, tmp_path):
    with served(service, ServeConfig(data=tmp_path, loras={"watercolour": "/w", "slow": "/s"})) as (where, _):
        yield where


def ask(page, prompt):
    page.wait_for_selector("#form.ready")
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def asked(page, service, prompt):
    """The job that a prompt has become."""
    ask(page, prompt)
    page.wait_for_function("(text) => document.querySelector('#stage .prompt')?.textContent === text", arg=prompt)
    return next(standing.job for standing in service.jobs.values() if standing.job.ask.request["prompt"] == prompt)


def picture(width=60, height=40):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, "PNG")
    return {"name": "first.png", "mimeType": "image/png", "buffer": file.getvalue()}


@pytest.mark.parametrize(("experts", "shown"), [(1, False), (2, True), (None, True)])
def test_a_number_of_the_second_expert_is_shown_where_there_may_be_one(browser, service, address, experts, shown):
    defaults = {**service.card.defaults, "guidance_scale_2": 4.0}
    service.card = msgspec.structs.replace(service.card, experts=experts, defaults=defaults)
    with opened(browser, address) as page:
        page.wait_for_selector("#form.ready")
        assert page.locator("#guidance_scale").count() == 1
        assert page.locator("#guidance_scale_2").count() == shown


def test_nothing_yet_is_an_invitation(browser, address):
    with opened(browser, address) as page:
        page.wait_for_selector(".example")
        assert page.evaluate(AUDIT) == []
        text = page.locator(".example").first.inner_text()
        page.locator(".example").first.click()
        assert page.input_value("#prompt") == text
        assert page.evaluate("document.activeElement.id") == "prompt"


def test_all_settings_arrive(browser, address, service):
    with opened(browser, address) as page:
        page.wait_for_selector("#form.ready")
        page.locator("input[value='9:16']").check()
        page.get_by_role("group", name="Usual lengths").get_by_role("button").last.click()
        page.locator("#steps").fill("11")
        page.locator("input[name=seeds][value=fixed]").check()
        page.fill("#seed", "77")
        page.locator("summary").click()
        page.fill("#guidance_scale", "4.5")
        page.fill("#fps", "12")
        page.fill("#negative_prompt", "people")
        page.locator("#loras input[type=checkbox]").first.check()
        page.get_by_label("Strength of watercolour").fill("0.8")
        job = asked(page, service, HOSTILE)
        assert page.locator("#stage img[src=x], #cards img[src=x], #stage b").count() == 0
        assert dict(job.ask.request) == {
            "prompt": HOSTILE, "width": 64, "height": 112, "num_frames": 65, "steps": 11, "seed": 77,
            "guidance_scale": 4.5, "fps": 12.0, "negative_prompt": "people",
        }  # fmt: skip
        assert list(job.ask.loras) == [("watercolour", 0.8)]
        page.get_by_role("button", name="Remix").click()
        page.fill("#prompt", "again")
        again = asked(page, service, "again")
        assert {**again.ask.request, "prompt": HOSTILE} == job.ask.request
        assert again.ask.loras == job.ask.loras


def test_a_picture_is_chosen_kept_sent_and_taken_over(browser, address, service):
    with opened(browser, address) as page:
        page.wait_for_selector("#form.ready")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="First frame").click()
        chooser.value.set_files({"name": "note.txt", "mimeType": "text/plain", "buffer": b"no picture"})
        page.wait_for_selector("#error-input_reference:has-text('is no PNG, JPEG or WebP picture')")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="First frame").click()
        chooser.value.set_files(picture())
        page.wait_for_selector("#pictures img")
        assert page.inner_text("#error-input_reference") == ""
        assert page.locator("input[name=shapes]:checked").get_attribute("value") == "picture"
        page.reload()
        page.wait_for_selector("#pictures img")
        assert page.locator("input[name=shapes]:checked").get_attribute("value") == "picture"
        job = asked(page, service, "it begins to move")
        assert service.folder(job.id).joinpath(job.ask.request["image"]).is_file()
        assert job.ask.request["width"] / job.ask.request["height"] == pytest.approx(1.5, abs=0.15)
        page.get_by_role("button", name="Remix").click()
        page.wait_for_selector("#from-source:has-text('the pictures of the earlier video')")
        page.fill("#prompt", "it moves otherwise")
        again = asked(page, service, "it moves otherwise")
        assert (again.ask.kind, again.ask.source) == ("remix", job.id)
        assert service.folder(again.id).joinpath(again.ask.request["image"]).is_file()


def test_pictures_are_dropped_and_pasted(browser, address):
    give = """([kind, bytes]) => {
      const files = new DataTransfer();
      files.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
      const box = document.querySelector("#prompt-box");
      if (kind === "paste") return document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: files }));
      for (const name of ["dragover", "drop"]) {
        box.dispatchEvent(new DragEvent(name, { dataTransfer: files, bubbles: true, cancelable: true }));
      }
    }"""
    for kind in ("drop", "paste"):
        with opened(browser, address) as page:
            page.wait_for_selector("#form.ready")
            page.evaluate(give, [kind, list(picture()["buffer"])])
            page.wait_for_selector("#pictures img")
            page.get_by_role("button", name="Remove the first frame").click()
            assert page.locator("#pictures img").count() == 0
            assert page.evaluate("document.activeElement.id") == "add-input_reference"


def test_errors_stand_beside_what_caused_them(browser, address):
    with opened(browser, address) as page:
        ask(page, "  ")
        assert page.inner_text("#error-prompt") == "Say what the video should show."
        page.fill("#prompt", "a star")
        assert page.inner_text("#error-prompt") == ""
        page.locator("summary").click()
        page.fill("#guidance_scale", "2000")
        page.press("#prompt", "Enter")
        page.wait_for_selector("#error-guidance_scale:has-text('guidance scale 2000')")
        assert page.get_attribute("#guidance_scale", "aria-invalid") == "true"
        page.fill("#guidance_scale", "4")
        assert page.inner_text("#error-guidance_scale") == ""


def test_a_full_queue_says_when_to_come_again(browser, address, service):
    service.refusal = RefusedError("queue_full", "100 videos wait already", retry_s=2)
    with opened(browser, address) as page:
        ask(page, "a star")
        page.wait_for_selector("#error-form:has-text('100 videos wait already')")
        page.wait_for_selector("#forecast:has-text('Come again in')")
        page.wait_for_selector("#error-form:has-text('There may be room now')")
        service.refusal = None
        asked(page, service, "a star")


def test_trouble_and_failures_are_told(browser, address, service):
    service.is_ready, service.trouble = False, "the server is being stopped"
    with opened(browser, address) as page:
        page.wait_for_selector("#banner:has-text('the server is being stopped')")
        service.is_ready = True
        page.wait_for_selector("#banner", state="hidden")
        job = asked(page, service, "a star")
        what = f"out of memory: {HOSTILE}"
        service.set(job.id, status="failed", attempts=3, error=JobError(code="out_of_memory", message=what))
        page.wait_for_selector("#stage .problem")
        assert page.inner_text("#stage .problem") == what
        assert "3 times" in page.inner_text("#stage .standing")
        assert page.evaluate(AUDIT) == []


@pytest.mark.parametrize(
    ("answer", "says"), [(None, "The server does not answer"), ({"status": 502}, "The server answered 502")]
)
def test_without_a_connection_nothing_is_lost_and_nothing_made_twice(browser, address, service, answer, says):
    with opened(browser, address) as page:
        page.wait_for_selector("#form.ready")
        lost = []

        def lose(route):
            if lost:
                route.continue_()
            else:
                lost.append(route.fetch())  # the server has it, and the answer goes astray
                route.abort() if answer is None else route.fulfill(**answer)

        page.route("**/v1/videos", lose)
        ask(page, "a star")
        page.wait_for_selector(f"#error-form:has-text('{says}')")
        assert page.input_value("#prompt") == "a star"
        page.press("#prompt", "Enter")
        page.wait_for_selector("#stage .prompt")
        assert len(service.jobs) == 1
        page.context.set_offline(True)
        page.evaluate("dispatchEvent(new Event('online'))")  # it looks, and finds nobody
        page.wait_for_selector("#banner:has-text('does not answer')")
        page.context.set_offline(False)
        page.wait_for_selector("#banner", state="hidden")
        page.unroute_all()


def test_many_videos_come_by_pages(browser, address, service):
    with opened(browser, address) as page:
        page.wait_for_selector("#form.ready")
        page.evaluate("""async () => {
          for (let n = 0; n < 60; n++) {
            await fetch("v1/videos", { method: "POST", headers: { "Content-Type": "application/json" },
              body: JSON.stringify({ prompt: `number ${n}` }) });
          }
        }""")
        for job_id in list(service.jobs):
            service.fail(job_id, "cancelled")
        page.reload()
        page.wait_for_selector(".card")
        while page.locator("#more").is_visible():
            page.locator("#more").scroll_into_view_if_needed()
            count = page.locator(".card").count()
            page.wait_for_function(
                """(count) => document.querySelectorAll('.card').length > count
                || document.querySelector('#more').hidden""",
                arg=count,
            )
        names = page.locator(".card .caption").all_inner_texts()
        assert sorted(names) == sorted(f"number {n}" for n in range(60))


def test_a_key_is_asked_for_kept_for_the_tab_and_never_in_an_address(browser, service, tmp_path):
    keys = (Key(name="alice", secret=SECRET),)
    with served(service, ServeConfig(data=tmp_path, keys=keys)) as (address, _), opened(browser, address) as page:
        addresses = []
        page.on("request", lambda request: addresses.append(request.url))
        page.wait_for_selector("#key-dialog[open]")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.press("Escape")
        page.wait_for_selector("h2:has-text('This server asks for a key')")
        assert page.evaluate(AUDIT) == []
        page.get_by_role("button", name="Enter the key").click()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-error:not(:empty)")
        page.fill("#key", SECRET)
        page.keyboard.press("Enter")
        job = asked(page, service, "a star")
        assert job.ask.key == "alice"
        page.reload()
        page.wait_for_selector("#stage .prompt")
        assert not page.locator("#key-dialog").is_visible()
        assert page.evaluate("localStorage.getItem('frameloom.key')") is None
        assert not [url for url in addresses if SECRET in url]


def by_program(address, prompt):
    """The id of a job that is asked for without the page."""
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(f"{address}/v1/videos", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["id"]


def card(prompt):
    return f".card:has-text('{prompt}')"


def test_a_question_asked_again_at_once_has_an_answer_of_its_own(browser, address, service):
    """A browser tells that a dialog has closed a moment after, when it may be open again."""
    lost = by_program(address, "it goes")
    service.fail(lost, "cancelled")
    with opened(browser, f"{address}/#{lost}") as page:
        page.wait_for_selector("#stage .prompt")
        page.get_by_role("button", name="Delete").click()
        page.evaluate("""() => new Promise((resolve) => {
          const dialog = document.querySelector("#ask-dialog");
          dialog.addEventListener("close", (event) => event.isTrusted && resolve());
          dialog.close();
          document.querySelector("#stage .actions button:last-child").click();
        })""")
        assert page.locator("#ask-dialog").is_visible()
        assert lost in service.jobs
        page.click("#ask-yes")
        page.wait_for_selector(card("it goes"), state="detached")
        assert lost not in service.jobs


def test_an_open_page_notices_what_others_do_and_leaves_the_rest_alone(browser, address, service):
    kept, lost = by_program(address, "it stays"), by_program(address, "it goes")
    for job_id in (kept, lost):
        service.fail(job_id, "cancelled")  # nothing is active: nothing else makes the page look again
    with opened(browser, f"{address}/#{kept}") as page:
        page.wait_for_selector(card("it goes"))
        page.focus(card("it stays"))
        page.evaluate("window.nodes = [document.activeElement, document.querySelector('#stage .prompt')]")
        new = by_program(address, "it came")
        del service.jobs[lost]
        page.wait_for_selector(card("it came"))
        page.wait_for_selector(card("it goes"), state="detached")
        assert page.locator(".card .caption").all_inner_texts() == ["it came", "it stays"]
        assert page.evaluate(
            "window.nodes[0] === document.activeElement && window.nodes[1] === document.querySelector('#stage .prompt')"
        )
        service.fail(new, "cancelled")
        page.wait_for_selector(f"{card('it came')} .failed")


def test_the_chosen_video_deleted_elsewhere_gives_way_to_another(browser, address, service):
    first, second = by_program(address, "the first"), by_program(address, "the second")
    for job_id in (first, second):
        service.fail(job_id, "cancelled")
    with opened(browser, f"{address}/#{first}") as page:
        page.wait_for_selector("#stage .prompt:has-text('the first')")
        page.focus(card("the first"))
        del service.jobs[first]
        page.wait_for_selector("#stage .prompt:has-text('the second')")
        assert page.url.endswith(f"#{second}")
        assert page.inner_text("#toast") == "The video was deleted elsewhere."
        assert page.evaluate("document.activeElement === document.querySelector('.card')")
        del service.jobs[second]
        page.wait_for_selector(".example")
        assert page.locator(".card").count() == 0


def test_a_page_that_is_looked_at_again_catches_up_at_once_however_much_came(browser, address, service):
    """The clock of the page stands still: what it notices it notices by being looked at."""
    for number in range(30):
        service.fail(by_program(address, f"early {number}"), "cancelled")
    with opened(browser, address) as page:
        page.wait_for_selector("#more:not([hidden])")
        page.wait_for_selector(card("early 29"))
        page.clock.install()
        page.clock.pause_at("2100-01-01")
        for number in range(130):  # more than one page of the list
            service.fail(by_program(address, f"late {number}"), "cancelled")
        page.evaluate("dispatchEvent(new Event('focus'))")
        page.wait_for_selector(card("late 129"))
        names = page.locator(".card .caption").all_inner_texts()
        expected = [f"late {n}" for n in reversed(range(130))] + [f"early {n}" for n in reversed(range(30))]
        assert len(names) >= 130 + 24
        assert names == expected[: len(names)]


def test_a_page_in_sight_looks_by_itself_and_one_out_of_sight_does_not(browser, address, service):
    def more(prompt):
        service.fail(by_program(address, prompt), "cancelled")

    with opened(browser, address) as page:
        page.wait_for_selector("#form.ready")
        page.clock.install()  # from here on the page's timers are the test's
        more("one")
        page.evaluate("dispatchEvent(new Event('focus'))")
        page.wait_for_selector(card("one"))
        more("two")
        page.clock.run_for(10_000)
        page.wait_for_selector(card("two"))
        page.evaluate("""() => {
          window.away = true;
          Object.defineProperty(document, "hidden", { get: () => window.away });
          document.dispatchEvent(new Event("visibilitychange"));
        }""")
        asked = []
        page.on("request", lambda request: asked.append(request.url) if "/v1/videos?" in request.url else None)
        more("three")
        page.clock.run_for(60_000)
        assert asked == []
        page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_selector(card("three"))


def test_an_error_about_a_model_that_opens_is_over_when_it_is_open(browser, address, service):
    model, service.card = service.card, None
    service.is_ready, service.trouble = False, "the model is being opened"
    with opened(browser, address) as page:
        page.wait_for_selector("#banner:has-text('the model is being opened')")
        page.fill("#prompt", "a star")
        page.press("#prompt", "Control+Enter")
        page.wait_for_selector("#error-form:has-text('wait a moment')")
        service.card, service.is_ready = model, True
        page.wait_for_selector("#form.ready")
        assert page.inner_text("#error-form") == ""
        assert page.input_value("#prompt") == "a star"


def test_an_error_about_a_lost_connection_is_over_when_it_is_back(browser, address):
    with opened(browser, address) as page:
        page.wait_for_selector("#form.ready")
        page.context.set_offline(True)
        ask(page, "a star")
        page.wait_for_selector("#error-form:has-text('does not answer')")
        page.evaluate("dispatchEvent(new Event('online'))")  # it looks, and finds nobody
        page.wait_for_selector("#banner:has-text('does not answer')")
        page.context.set_offline(False)
        page.wait_for_selector("#banner", state="hidden")
        page.wait_for_selector("#error-form:empty", state="attached")


def test_the_guide_names_the_keys_that_the_page_names(browser, address, service):
    with opened(browser, address) as page:
        page.wait_for_selector("#form.ready")
        assert page.inner_text("#prompt-help").startswith("Enter generates")
        assert "Enter generates, Shift+Enter begins a new line" in GUIDE.read_text()
        page.focus("#prompt")
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        assert page.input_value("#prompt") == "one\ntwo"
        assert not service.jobs
        page.keyboard.press("Enter")
        page.wait_for_selector("#stage .prompt:has-text('two')")


@pytest.mark.parametrize(
    ("frames", "fps", "told", "shown"),
    [(17, 8, "2", "2 s"), (33, 16, "2", "2 s"), (21, 16, "1.25", "1.3 s"), (1, 16, "0.062", "0.06 s")],
)
def test_a_length_is_the_one_of_the_api(browser, address, service, frames, fps, told, shown):
    with opened(browser, address) as page:
        page.wait_for_selector("#form.ready")
        page.locator("summary").click()
        page.fill("#fps", str(fps))
        page.fill("#num_frames", str(frames))
        page.locator("#prompt").focus()
        assert page.inner_text("#length-out") == shown
        job = asked(page, service, "a star")
        with urllib.request.urlopen(f"{address}/v1/videos/{job.id}") as answer:
            assert json.load(answer)["seconds"] == told
        assert shown in page.locator("#stage .facts li").all_inner_texts()


SAME = {
    "seed": 5, "width": 96, "height": 64, "num_frames": 17, "steps": 3, "fps": 8.0, "negative_prompt": "",
    "guidance_scale": 2.0, "control_strength": [0.5, 1.0], "windows": False,
}  # fmt: skip
PICTURES = {
    "image": "inputs/image.png", "control_video": "inputs/control_video.mp4", "mask": "inputs/mask.mp4",
    "references": ["inputs/reference-0.png"],
}  # fmt: skip
EDIT = {"seed": 5, "video": "inputs/video.mp4", "strength": 0.5, "num_frames": 17, "window_frames": 9, "windows": True}
EXTENSION = {"seed": 5, "extends": "inputs/extends.mp4", "num_frames": 17}
EDITED = {"video": "video.mp4", "strength": 0.5, "windows": True, "window_frames": 9}
COPIED = (
    ("it's new", "create", SAME, {"windows": False, "control_strength": [0.5, 1.0], "negative_prompt": ""}),
    ("--pictures", "create", {**SAME, **PICTURES}, {
        "image": "input_reference.png", "control_video": "control_video.mp4", "mask": "mask.mp4",
        "reference": ["reference.png"],
    }),
    ("@edit", "edit", EDIT, EDITED), ("<edit", "remix", EDIT, EDITED),
    ("@extension", "extension", EXTENSION, None), ("<extension", "remix", EXTENSION, None),
)  # fmt: skip
"""Prompts, kinds and requests of jobs, and what the command of each says; None: it has none."""


def kept(service, prompt, kind, request):
    """A job of a service, with empty files where the request names some."""
    request = {"prompt": prompt, **request}
    ask = Ask(key="local", kind=kind, model="frameloom-shapes", request=request, loras=(("slow", 0.5),), quality=30)
    job = Job(id=service.new_id(), ask=ask, status="queued", created_at=0.0)
    (service.folder(job.id) / "inputs").mkdir(parents=True)
    for name in [name for value in request.values() for name in (value if isinstance(value, list) else [value])]:
        if str(name).startswith("inputs/"):
            (service.folder(job.id) / name).touch()
    service.jobs[job.id] = Standing(job=job, position=0)
    return job


def copied(page, name):
    """The words that a button leaves on the clipboard."""
    page.evaluate("navigator.clipboard.writeText('')")
    page.get_by_role("button", name=name).click()
    page.wait_for_function("() => navigator.clipboard.readText()")
    return shlex.split(page.evaluate("navigator.clipboard.readText()"))


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_what_is_copied_asks_for_the_same(browser, address, service):
    service.card = msgspec.structs.replace(service.card, takes=(*service.card.takes, "control_video", "mask"))
    jobs = [kept(service, prompt, kind, request) for prompt, kind, request, _ in COPIED]
    generate = typer.main.get_command(app).get_command(None, "generate")
    with opened(browser, address, permissions=["clipboard-read", "clipboard-write"]) as page:
        for job, (prompt, _, _, options) in zip(jobs, COPIED, strict=True):
            page.locator(".card", has_text=prompt).first.click()
            curl = subprocess.run([*copied(page, "Copy as curl"), "-s", "--noproxy", "*"], stdout=-1, check=True).stdout
            again = service.jobs[json.loads(curl)["id"]].job.ask
            assert (again.request, again.loras, again.quality) == (job.ask.request, job.ask.loras, job.ask.quality)
            if options is None:
                page.get_by_role("button", name="Copy as command").click()
                page.wait_for_selector("#toast:has-text('No single command goes on from another video')")
                continue
            first, second, *words = copied(page, "Copy as command")
            assert (first, second) == ("frameloom", "generate")
            said = generate.make_context(second, words).params
            same = {"prompt": prompt, "seed": 5, "frames": 17, "lora": ["slow.safetensors:0.5"], **options}
            assert {name: said[name] for name in same} == same
