"""The page at /, in a real browser: what a person types, sees and clicks."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.clients.serving import Served
from tests.clients.truths import answer, question
from tests.clients.workers import ClientError, Worker, node_worker
from tests.runtime.server.serving import until

pytestmark = pytest.mark.slow

IDLE = "document.querySelector('#send').textContent === 'Send'"
SHOWN = "[...document.querySelectorAll('article')].map(a => [a.className, a.querySelector('span').textContent])"
NOTES = "[...document.querySelectorAll('article small')].map(s => s.textContent)"
WATCH = """window.seen = [];
new MutationObserver(() => seen.push(document.querySelector('article.assistant')?.textContent.length))
.observe(document.querySelector('#log'), {subtree: true, childList: true})"""


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Worker]:
    """Chromium, which unpacks itself into a folder of this run."""
    scratch = str(tmp_path_factory.mktemp("chromium"))
    with closing(node_worker("browser", tmp_path_factory.mktemp("browser"), {"TMPDIR": scratch, "HOME": scratch})) as worker:
        try:
            worker.call("open", "about:blank")
        except ClientError as error:
            if "CI" in os.environ:
                raise
            pytest.skip(f"npm's Chromium, which is for Linux on x86-64, does not start here: {error.message[:200]}")
        yield worker


class Page:
    """The page of a server."""

    def __init__(self, browser: Worker, served: Served):
        self.browser, self.served = browser, served
        browser.call("open", f"{served.url}/")
        self.until("document.querySelector('#model').textContent !== '…'")

    def until(self, expression: str):
        return self.browser.call("until", expression)

    def evaluate(self, expression: str):
        return self.browser.call("evaluate", expression)

    @property
    def shown(self) -> list[list[str]]:
        """Role and text of every box."""
        return self.evaluate(SHOWN)

    def fill(self, selector: str, text: str) -> None:
        self.browser.call("fill", selector, text)

    def say(self, text: str) -> None:
        """Types a message and presses Enter."""
        self.browser.call("type", "#text", text)
        self.browser.call("press", "Enter")

    def ask(self, text: str) -> str:
        """The answer to a message, whole."""
        boxes = len(self.shown)
        self.say(text)
        self.until(f"document.querySelectorAll('article').length >= {boxes + 2} && {IDLE}")
        return self.shown[-1][1]


@pytest.fixture
def opened(browser):
    """Opens the page of a server; at the end nothing may have gone wrong in it but what a test expects."""
    expected: list[str] = []

    def opened(served: Served, *faults: str) -> Page:
        expected.extend(faults)
        page = Page(browser, served)
        page.fill("#temperature", "0")
        return page

    yield opened
    faults = browser.call("errors")
    assert [fault for fault in faults if not any(words in fault for words in expected)] == []


@pytest.fixture(scope="module")
def talkative(start, example_bundle, tmp_path_factory):
    """A server whose answers are long."""
    bundle = Path(shutil.copytree(example_bundle, tmp_path_factory.mktemp("talkative") / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["text"]["sampling"] = {"min_new_tokens": 1900, "max_new_tokens": 2000}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with start(bundle=bundle) as served:
        yield served


def test_a_message_gets_a_streamed_answer_and_a_note(opened, served, engine):
    page = opened(served)
    assert page.evaluate("document.querySelector('#model').textContent") == "example"
    page.evaluate(WATCH)
    asked = "What is seven plus five?"
    expected = answer(engine, question(asked), max_new_tokens=512)
    said = page.ask(asked)
    assert page.shown == [["user", asked], ["assistant", expected.text.strip()]] and said == expected.text.strip()
    (note,) = page.evaluate(NOTES)
    found = re.fullmatch(r"(\d+) prompt tokens \((\d+) cached\), (\d+) new in \d+\.\d s", note)
    assert [int(found[1]), int(found[3])] == [expected.prompt_tokens, len(expected.token_ids)]
    lengths = [length for length in page.evaluate("seen") if length]
    assert lengths == sorted(lengths) and len(set(lengths)) > 3  # it grew
    assert page.evaluate("document.activeElement.id") == "text" and page.evaluate("document.querySelector('#text').value") == ""


def test_the_conversation_goes_on_and_a_new_one_begins(opened, served, engine):
    page, messages = opened(served), []
    for asked in ("What is x?", "And what is y?"):
        messages += question(asked)
        expected = answer(engine, messages, max_new_tokens=512).text
        assert page.ask(asked) == expected.strip()
        messages.append({"role": "assistant", "content": expected})
    page.browser.call("click", "#clear")
    assert page.shown == []
    assert page.ask("And what is y?") == answer(engine, question("And what is y?"), max_new_tokens=512).text.strip()
    assert f"{answer(engine, question('And what is y?')).prompt_tokens} prompt tokens" in page.evaluate(NOTES)[0]


def test_shift_enter_begins_a_line_and_blanks_are_not_sent(opened, served, engine):
    page = opened(served)
    page.say("   ")
    page.fill("#text", "one")
    page.browser.call("press", "Enter", "Shift")
    assert page.shown == []
    assert page.ask("two") == answer(engine, question("one\ntwo"), max_new_tokens=512).text.strip()
    assert page.shown[0] == ["user", "one\ntwo"]


def test_the_longest_answer_and_text_that_looks_like_html(opened, served, engine):
    page = opened(served)
    page.fill("#longest", "3")
    asked = "<b>bold</b><img src=x onerror=alert(1)>"
    assert page.ask(asked) == answer(engine, question(asked), max_new_tokens=3).text.strip()
    assert page.shown[0] == ["user", asked] and page.evaluate("document.querySelectorAll('#log b, #log img').length") == 0


def test_stop_ends_an_answer_and_the_conversation_goes_on(opened, talkative, engine):
    page = opened(talkative)
    page.fill("#longest", "2000")
    page.say("Tell me.")
    page.until("document.querySelector('article.assistant span')?.textContent.length > 20")
    page.browser.call("click", "#send")
    page.until(IDLE)
    assert page.evaluate(NOTES) == ["stopped"]
    (_, asked), (_, begun) = page.shown
    whole = answer(engine, question("Tell me."), max_new_tokens=1900, min_new_tokens=1900).text.lstrip()
    assert asked == "Tell me." and whole.startswith(begun) and len(begun) < len(whole)
    until(lambda: talkative.gauges() == [0, 0, 0])
    page.fill("#longest", "3")
    said = {"role": "assistant", "content": page.evaluate("messages[1].content")}
    history = [*question("Tell me."), said, *question("More.")]
    assert page.ask("More.") == answer(engine, history, max_new_tokens=3, min_new_tokens=3).text.strip()


@pytest.mark.parametrize("begun", [True, False])
def test_a_new_chat_ends_an_answer_that_runs(opened, talkative, begun):
    page = opened(talkative)
    page.fill("#longest", "2000")
    if begun:
        page.say("Tell me.")
        page.until("document.querySelector('article.assistant span')?.textContent.length > 20")
        page.browser.call("click", "#clear")
    else:  # before anything of the answer is there
        page.evaluate("get('text').value = 'Tell me.'; get('form').requestSubmit(); get('clear').click()")
    page.until(IDLE)
    assert page.shown == [] and page.evaluate("messages") == []
    until(lambda: talkative.gauges() == [0, 0, 0])
    page.fill("#longest", "3")
    page.ask("Again.")
    assert [role for role, _ in page.shown] == ["user", "assistant"]


def test_a_key_that_is_missing_is_told_and_can_be_given(opened, start, engine):
    with start("--api-key", "secret", key="secret") as guarded:
        page = opened(guarded, "401")
        ((role, words),) = page.until(f"document.querySelector('article.error') && {SHOWN}")
        assert role == "error" and "no valid API key" in words
        page.say("What is x?")
        page.until(f"document.querySelector('article.error') && {IDLE} && get('text').value")
        assert page.evaluate("document.querySelector('#text').value") == "What is x?"  # nothing that was typed is lost
        page.fill("#key", "secret")
        page.browser.call("click", "#send")
        page.until(f"document.querySelector('article.assistant small') && {IDLE}")
        assert page.shown[-1][1] == answer(engine, question("What is x?"), max_new_tokens=512).text.strip()
        assert page.evaluate("document.querySelector('#model').textContent") == "example"


def test_a_refusal_is_told_and_nothing_is_lost(opened, served, engine):
    page = opened(served, "400")
    page.fill("#temperature", "9")
    page.say("What is x?")
    page.until(f"document.querySelector('article.error') && {IDLE}")
    assert page.shown[-1][0] == "error" and page.shown[-1][1].startswith("temperature: ")
    page.fill("#temperature", "0")
    page.browser.call("click", "#send")
    page.until(f"document.querySelector('article.assistant small') && {IDLE}")
    assert page.shown[-1][1] == answer(engine, question("What is x?"), max_new_tokens=512).text.strip()
    assert [role for role, _ in page.shown] == ["user", "assistant"]  # what was not sent is no message


def test_a_server_that_is_gone_is_told(opened, start):
    with start() as served:
        page = opened(served, "ERR_CONNECTION_REFUSED")
        page.ask("What is x?")
        assert served.stop() == 0
        page.say("And y?")
        page.until(f"document.querySelector('article.error') && {IDLE}")
        assert page.shown[-1][0] == "error" and "cannot be reached" in page.shown[-1][1]
        assert page.evaluate("document.querySelector('#text').value") == "And y?"


def test_a_server_that_goes_in_the_midst_of_an_answer_is_told(opened, talkative, start):
    """Killed, not stopped: the stream breaks off."""
    bundle = Path(talkative.process.args[talkative.process.args.index("serve") + 1])
    served = Served(bundle, bundle.parent / "killed.log")
    page = opened(served, "ERR_")
    page.fill("#longest", "2000")
    page.say("Tell me.")
    page.until("document.querySelector('article.assistant span')?.textContent.length > 20")
    served.process.kill()
    served.process.wait(60)
    served.process.stdout.close()
    page.until(f"document.querySelector('article.error') && {IDLE}")
    assert [role for role, _ in page.shown] == ["user", "assistant", "error"]
    assert "broke off" in page.shown[-1][1] or "cannot be reached" in page.shown[-1][1]
