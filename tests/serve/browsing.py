"""A browser for tests of the page, which notices what the page must never do."""

import contextlib
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = Path("/usr/bin/chromium")
SLOW_MS = 180_000
"""How long a condition is waited for: a machine that does much else must not fail a test."""
_ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
_LISTEN = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""
_EXPECTED = "Failed to load resource:"


@contextlib.contextmanager
def chromium():
    """The system's Chromium, without a window; the test is skipped where it is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Watch:
    """What a page has asked for and complained about."""

    def __init__(self, page, address):
        self.page, self.host = page, urlsplit(address).netloc
        self.complaints, self.foreign = [], []
        page.on("console", lambda told: self._heard(told.type, told.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._asked)

    def _heard(self, kind, text):
        if kind in ("error", "warning") and not text.startswith(
            _EXPECTED
        ):  # refusals and lost answers: the page tells of them
            self.complaints.append(text)

    def _asked(self, request):
        where = urlsplit(request.url)
        if where.scheme not in ("blob", "data") and where.netloc != self.host:
            self.foreign.append(request.url)

    def check(self):
        """Nothing was complained about, blocked by the policy, or asked of anybody else."""
        assert self.complaints == []
        assert self.foreign == []
        assert self.page.evaluate("window.violations") == []


@contextlib.contextmanager
def opened(browser, address, **options):
    """The page at an address, in a browser that knows nothing of earlier ones; it is checked at the end."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(SLOW_MS)
    page = context.new_page()
    page.add_init_script(_LISTEN)
    watch = Watch(page, address)
    try:
        page.goto(address)
        yield page
        watch.check()
    finally:
        context.close()


AUDIT = r"""
() => {
  const found = [];
  const shown = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true }) &&
    !element.closest(".sr, .sprite, [inert]");
  const text = (ids) => (ids ?? "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join(" ");
  const name = (element) => (element.getAttribute("aria-label") || text(element.getAttribute("aria-labelledby")) ||
    [...(element.labels ?? [])].map((label) => label.textContent).join(" ") ||
    (element.matches("button, a, summary") ? element.textContent : "") || element.alt || "").trim();
  for (const element of document.querySelectorAll("button, a, input, select, textarea, summary, progress, video")) {
    if (element.checkVisibility() && !name(element)) found.push(`no name: ${element.outerHTML.slice(0, 90)}`);
  }
  for (const image of document.images) {
    if (!image.hasAttribute("alt")) found.push(`no alt: ${image.outerHTML.slice(0, 90)}`);
  }
  for (const id of [...document.querySelectorAll("[id]")].map((element) => element.id)) {
    if (document.querySelectorAll(`[id="${id}"]`).length > 1) found.push(`twice: #${id}`);
  }
  for (const element of document.querySelectorAll("[aria-describedby], [for]")) {
    for (const id of (element.getAttribute("aria-describedby") ?? element.getAttribute("for")).split(" ")) {
      if (!document.getElementById(id)) found.push(`points to nothing: ${id}`);
    }
  }
  if (document.querySelectorAll("main").length !== 1 || !document.querySelector("aside, nav")) found.push("landmarks");
  if (document.querySelectorAll("h1").length !== 1 || !document.documentElement.lang) found.push("title or language");
  const numbers = (colour) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (let here = element; here; here = here.parentElement) {
      const style = getComputedStyle(here);
      const colour = numbers(style.backgroundColor);
      if (colour[3] > 200) return colour;
    }
    return [255, 255, 255];
  };
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !shown(element) || element.closest("svg, noscript, [disabled]")) continue;
    const ratio = contrast(numbers(getComputedStyle(element).color), behind(element));
    if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: ${element.textContent.trim().slice(0, 40)}`);
  }
  return found;
}
"""
"""What keeps people out: controls without a name, pictures without a text, contrast below 4.5, lost references."""
