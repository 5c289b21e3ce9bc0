"""The page at GET /, in a real headless Chromium against a gateway without a model."""

from __future__ import annotations

import json
from pathlib import Path

from int8qa.errors import EngineUnavailableError
from tests.gateway.fakes import CONTEXT, KEEPER, QUESTION, FakeEngine
from tests.page.chromium import CTRL, SHIFT, Page

ANSWERED = "!document.querySelector('#result').hidden && document.querySelector('#cancel').hidden"
PROBLEM = "document.querySelector('#ask-problem .problem')"
HOSTILE = "<img src=x onerror=alert(1)><script>document.title='owned'</script> "


async def ask(page: Page, context: str = CONTEXT, question: str = QUESTION) -> None:
    """Type a text and a question, press the button, and wait for the answer."""
    await page.write("#context", context)
    await page.write("#question", question)
    await page.click("#ask")
    await page.wait_for(ANSWERED)


async def read_marks(page: Page, kind: str) -> list[list[object]]:
    """Each mark of a kind: its text, and its first code point in the text shown."""
    marks: list[list[object]] = await page.evaluate(
        f"""[...document.querySelectorAll("#text-view mark.{kind}")].map((mark) => {{
          const before = document.createRange();
          before.selectNodeContents(document.querySelector("#text-view"));
          before.setEndBefore(mark);
          return [mark.textContent, [...before.toString()].length];
        }})"""
    )
    return marks


async def test_answer_is_highlighted_at_its_code_points(page: Page):
    """Emoji before the answer shift nothing, though they are two units of a string."""
    context = f"🚢🌊👩‍👩‍👧 {CONTEXT}"
    await ask(page, context)
    assert await page.text("#text-view") == context
    assert await read_marks(page, "selected") == [[KEEPER, context.index(KEEPER)]]
    assert await read_marks(page, "fp16") == [["1907", context.index("1907")]]


async def test_both_precisions_stand_side_by_side(page: Page):
    """Two columns: answers, scores, four stages each, and whether they agree."""
    await ask(page)
    assert await page.texts(".run h3") == ["INT8", "FP16"]
    assert await page.texts(".answer.best .words") == [KEEPER, "1907"]
    assert await page.text(".facts [data-kind=differ] dd") == "No"
    for run in ("int8", "fp16"):
        stages = await page.texts(f".run.{run} .stages dt")
        assert stages == ["tokenize", "queue", "inference", "decode", "total"]
        times = await page.texts(f".run.{run} .stages dd")
        assert all(time.endswith(" ms") for time in times)
        bar = f".run.{run} .stage-bar"
        label = await page.evaluate(
            f"document.querySelector('{bar}').getAttribute('aria-label')"
        )
        assert times[2] in label
        widths = await page.evaluate(
            f"[...document.querySelectorAll('{bar} rect')]"
            ".map((rect) => parseFloat(rect.getAttribute('width')))"
        )
        assert len(widths) == 4
        assert sum(widths) <= 100.1
    left, right = await page.evaluate(
        "[...document.querySelectorAll('.run')].map((run) => run.getBoundingClientRect().top)"
    )
    assert left == right
    spoken = await page.text("#announcement")
    assert KEEPER in spoken
    assert "differ" in spoken


async def test_one_precision_is_asked_alone(page: Page, engine: FakeEngine):
    """Choosing FP32 asks FP32, and shows one column."""
    await page.wait_for("document.querySelector('[name=precision][value=fp32]')")
    await page.click(".choice.fp32")
    await ask(page)
    assert await page.texts(".run h3") == ["FP32"]
    assert {used.value for used, _ in engine.calls} == {"fp32"}


async def test_markup_stays_text(page: Page):
    """Neither the text, nor the answer, nor the build's words become elements."""
    context = f"{HOSTILE}{CONTEXT}"
    await ask(page, context, "Who is <i>keeper</i>?")
    assert await page.text("#text-view") == context
    assert (
        await page.evaluate("document.querySelectorAll('img, #text-view b').length")
        == 0
    )
    assert await page.evaluate("document.querySelectorAll('script').length") == 1
    await page.wait_for("!document.querySelector('#models').hidden")
    assert await page.text("#verdict") == "INT8 <b>wins</b> here."
    assert "owned" not in await page.evaluate("document.title")


async def test_alternatives_can_be_chosen(page: Page):
    """Choosing another answer highlights that one, and only that one."""
    await ask(page)
    first = ".run.int8 li:nth-child(1) button"
    second = ".run.int8 li:nth-child(2) button"
    wanted = await page.text(f"{second} .words")
    assert wanted != KEEPER
    await page.click(second)
    ((shown, start),) = await page.evaluate(
        "[[[...document.querySelectorAll('#text-view mark.selected')]"
        ".map((mark) => mark.textContent).join(''),"
        " document.querySelector('.text-view .hint').textContent]]"
    )
    assert shown == wanted
    assert str(CONTEXT.index(wanted)) in start
    pressed = "document.querySelector({}).getAttribute('aria-pressed')"
    assert await page.evaluate(pressed.format(json.dumps(first))) == "false"
    assert await page.evaluate(pressed.format(json.dumps(second))) == "true"


async def test_long_text_is_scrolled_to_the_answer(page: Page):
    """An answer far down stands inside what the box shows, and the page stays put."""
    await page.prefer(prefers_reduced_motion="reduce")
    filler = "Nothing of note happened on that grey day at sea. " * 80
    await ask(page, filler + CONTEXT)
    assert "windows" in await page.text(".facts")
    box, mark = await page.evaluate(
        """["#text-view", "#text-view mark.selected"].map((selector) => {
          const {top, bottom} = document.querySelector(selector).getBoundingClientRect();
          return [top, bottom];
        })"""
    )
    assert box[0] <= mark[0] < mark[1] <= box[1]
    assert await page.evaluate("document.querySelector('#text-view').scrollTop") > 100


async def test_too_long_a_text_is_explained(page: Page):
    """A 413 shows the service's words: what was measured, what is allowed."""
    await page.write("#context", "sea " * 2000)
    await page.click("#ask")
    await page.wait_for(PROBLEM)
    shown = await page.text("#ask-problem")
    assert "Too large" in shown
    assert "8000" in shown
    assert "5000" in shown
    assert await page.evaluate("document.activeElement.id") == "context"
    assert ["413" in refusal for refusal in page.refusals] == [True]


async def test_invalid_option_is_marked(page: Page):
    """A 422 opens the options, marks the field that it names and goes there."""
    await page.evaluate("document.querySelector('#top-k').value = 1000")
    await page.click("#ask")
    await page.wait_for(PROBLEM)
    assert "top_k" in await page.text("#ask-problem")
    assert await page.evaluate("document.querySelector('.options').open")
    assert await page.evaluate("document.activeElement.id") == "top-k"
    marked = "document.querySelector('#top-k').getAttribute('aria-invalid')"
    assert await page.evaluate(marked) == "true"
    await page.evaluate("document.querySelector('#top-k').value = 2")
    await page.click("#ask")
    await page.wait_for(ANSWERED)
    assert await page.evaluate(marked) is None
    assert await page.text("#ask-problem") == ""


async def test_engine_that_is_away_is_waited_for(page: Page, engine: FakeEngine):
    """A 503 shows why and counts down; when the engine is back, the answer comes."""
    engine.down = EngineUnavailableError("the engine does not answer")
    await page.write("#context", CONTEXT)
    await page.write("#question", QUESTION)
    await page.click("#ask")
    await page.wait_for("document.querySelector('#ask-problem .countdown')")
    assert "Engine unavailable" in await page.text("#ask-problem")
    assert "again in" in await page.text("#ask-problem .countdown")
    engine.down = None
    await page.wait_for(ANSWERED)
    assert await page.text("#ask-problem") == ""
    assert await page.texts(".answer.best .words") == [KEEPER, "1907"]


async def test_waiting_can_be_cancelled(page: Page, engine: FakeEngine):
    """Cancel ends a question that is under way; the form can be used again."""
    engine.open_gate.clear()
    await page.click("#ask")
    await page.wait_for("!document.querySelector('#cancel').hidden")
    await page.click("#cancel")
    await page.wait_for("document.querySelector('#cancel').hidden")
    assert await page.text("#announcement") == "Cancelled."
    assert await page.text("#ask") == "Ask"
    engine.open_gate.set()
    await ask(page)


async def test_network_that_is_gone_is_said(page: Page):
    """Without a connection the page says so in words, here and in the live part."""
    await page.send(
        "Network.emulateNetworkConditions",
        offline=True,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    await page.click("#ask")
    await page.wait_for(PROBLEM)
    shown = await page.text("#ask-problem")
    assert "cannot be reached" in shown
    assert "TypeError" not in shown
    await page.wait_for(
        "document.querySelector('#live-state').textContent.includes('Asking again')"
    )


async def test_keyboard_is_enough(page: Page):
    """From the top: skip, type, send by Ctrl+Enter, choose an answer by Space."""
    await page.press("Tab")
    assert await page.evaluate("document.activeElement.className") == "skip"
    await page.press("Enter")
    await page.wait_for("document.activeElement.id === 'question'")
    await page.evaluate("document.activeElement.select()")
    await page.send("Input.insertText", text=QUESTION)
    for _ in range(20):
        await page.press("Tab", SHIFT)
        if await page.evaluate("document.activeElement.id") == "context":
            break
    await page.evaluate("document.activeElement.select()")
    await page.send("Input.insertText", text=CONTEXT)
    await page.press("Enter", CTRL)
    await page.wait_for(ANSWERED)
    for _ in range(40):
        await page.press("Tab")
        if await page.evaluate("document.activeElement.matches('.run.fp16 .answer')"):
            break
    await page.press("Space")
    assert await read_marks(page, "selected") == [["1907", CONTEXT.index("1907")]]
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert await page.evaluate(outline) == "solid"


async def test_every_control_has_a_name(page: Page):
    """The accessibility tree holds no control, image or region without a name."""
    await ask(page)
    await page.send("Accessibility.enable")
    tree = await page.send("Accessibility.getFullAXTree")
    roles = ("button", "textbox", "spinbutton", "checkbox", "radio", "link", "image")
    seen = []
    for node in tree["nodes"]:
        role = node.get("role", {}).get("value")
        if role in roles and not node["ignored"]:
            seen.append(role)
            assert node["name"]["value"].strip(), node
    assert {"button", "textbox", "radio", "link", "image"} <= set(seen)


async def test_file_becomes_the_text(page: Page, tmp_path: Path):
    """An opened file fills the field and is asked as it stands, CRLF or not."""
    file = tmp_path / "log.txt"
    file.write_bytes(f"First line 🚢\r\n{CONTEXT}\r\n".encode())
    node = await page.send(
        "Runtime.evaluate", expression="document.querySelector('#file')"
    )
    await page.send(
        "DOM.setFileInputFiles",
        files=[str(file)],
        objectId=node["result"]["objectId"],
    )
    await page.wait_for("document.querySelector('#context').value.startsWith('First')")
    await page.write("#question", QUESTION)
    await page.click("#ask")
    await page.wait_for(ANSWERED)
    context = f"First line 🚢\n{CONTEXT}\n"
    assert await read_marks(page, "selected") == [[KEEPER, context.index(KEEPER)]]


async def test_file_that_is_no_text_is_refused(page: Page, tmp_path: Path):
    """Bytes that are not UTF-8 are explained, and the text stays."""
    before = await page.evaluate("document.querySelector('#context').value")
    file = tmp_path / "photo.txt"
    file.write_bytes(b"\xff\xd8\xff\xe0")
    node = await page.send(
        "Runtime.evaluate", expression="document.querySelector('#file')"
    )
    await page.send(
        "DOM.setFileInputFiles",
        files=[str(file)],
        objectId=node["result"]["objectId"],
    )
    await page.wait_for(PROBLEM)
    assert "Not a text file" in await page.text("#ask-problem")
    assert await page.evaluate("document.querySelector('#context').value") == before


async def test_examples_fill_the_form(page: Page):
    """Each example brings a text and a question; the chosen one alone is marked."""
    texts = []
    for index in range(4):
        await page.click(f"#examples button:nth-child({index + 1})")
        text = "document.querySelector('#context').value"
        await page.wait_for(f"!{json.dumps(texts)}.includes({text})")
        texts.append(await page.evaluate(text))
        question = await page.evaluate("document.querySelector('#question').value")
        assert question.endswith("?")
        assert len(await page.texts("#suggestions button")) == 3
        assert await page.text("#context-size") == f"{len(texts[-1]):,} characters"
        pressed = await page.evaluate(
            "[...document.querySelectorAll('#examples button')]"
            ".map((button) => button.getAttribute('aria-pressed'))"
        )
        assert pressed == ["true" if other == index else "false" for other in range(4)]
    assert max(texts, key=len) == texts[1]
    assert len(texts[1]) > 15_000
    assert any(ord(character) > 0xFFFF for character in texts[2])


async def test_live_part_explains_itself_until_there_are_pairs(page: Page):
    """Without pairs: words and a button. The button makes 50 pairs, then figures."""
    await page.wait_for("!document.querySelector('#no-pairs').hidden")
    assert await page.evaluate("document.querySelector('#live-report').hidden")
    await page.click("#traffic")
    await page.wait_for(
        "document.querySelector('#traffic-state').textContent.includes('50 questions sent')"
    )
    await page.wait_for(
        "document.querySelector('#pair-count').textContent.startsWith('50 pairs')"
    )
    assert await page.evaluate("document.querySelector('#no-pairs').hidden")
    assert (await page.text("#speedup-tile .value")).endswith("×")
    assert (await page.text("#agreement-tile .value")).endswith("%")
    assert await page.text("#guard-tile .value") == "Collecting"
    await page.wait_for("document.querySelector('#speedup-tile .sparkline polyline')")
    label = "document.querySelector('{} svg').getAttribute('aria-label')"
    assert "from" in await page.evaluate(label.format("#speedup-tile"))
    await page.wait_for("!document.querySelector('#latency-figure').hidden")
    assert "INT8’s median" in await page.evaluate(label.format("#latency-chart"))
    areas = "document.querySelectorAll('#latency-chart path.area').length"
    assert await page.evaluate(areas) == 2
    rows = await page.texts("#percentiles tr")
    assert [row.count("ms") for row in rows] == [3, 3]


async def test_example_traffic_can_be_stopped(page: Page, engine: FakeEngine):
    """A second press ends the traffic, however much was left."""
    engine.open_gate.clear()
    await page.click("#traffic")
    await page.wait_for("document.querySelector('#traffic').textContent === 'Stop'")
    await page.click("#traffic")
    await page.wait_for(
        "document.querySelector('#traffic').textContent.startsWith('Send')"
    )
    assert await page.text("#traffic-state") == "Stopped after 0 questions."


async def test_polling_rests_in_a_hidden_tab(page: Page):
    """Nobody looks: nothing is asked. Somebody looks again: it is asked at once."""
    polls = "performance.getEntriesByType('resource').filter((one) => one.name.endsWith('/v1/comparison')).length"
    await page.wait_for(f"{polls} >= 1")
    hide = """
      Object.defineProperty(document, "hidden", {configurable: true, get: () => %s});
      document.dispatchEvent(new Event("visibilitychange"));
    """
    await page.evaluate(hide % "true")
    before = await page.evaluate(polls)
    await page.evaluate("new Promise((resolve) => setTimeout(resolve, 2500))")
    assert await page.evaluate(polls) == before
    await page.evaluate(hide % "false")
    await page.wait_for(f"{polls} > {before}")


async def test_model_card_names_what_is_loaded(page: Page, url: str):
    """A column for each precision, the default marked, and a line for this address."""
    await page.wait_for("!document.querySelector('#models').hidden")
    heads = await page.texts("#model-table thead th")
    assert heads == ["INT8", "FP16", "FP32"]
    table = (await page.text("#model-table")).replace("\xad", "")
    assert "default, recommended" in table
    assert "80.50" in table
    assert (await page.text("#curl")).startswith(f"curl -s '{url}v1/answer'")
    assert await page.text("#service-state") == "Ready: acme/minilm-test"
    await page.click("#copy")
    await page.wait_for("document.querySelector('#copy-state').textContent !== ''")


async def test_narrow_phone_needs_no_sideways_scrolling(page: Page):
    """At 360 CSS pixels everything is inside, also long words."""
    await page.resize(360, 740)
    await ask(page, f"{'x' * 300} {CONTEXT}", f"{'y' * 200}?")
    await page.wait_for("!document.querySelector('#live-report').hidden")
    await page.wait_for("!document.querySelector('#models').hidden")
    assert await page.evaluate("document.documentElement.scrollWidth") == 360


async def test_contrast_is_enough(page: Page):
    """Light or dark, a text stands out from its ground by 4.5 to 1: WCAG 2.2, 1.4.3."""
    await ask(page)
    await page.wait_for("!document.querySelector('#live-report').hidden")
    await page.wait_for("!document.querySelector('#models').hidden")
    for scheme in ("light", "dark"):
        await page.prefer(prefers_color_scheme=scheme)
        poor, measured = await page.evaluate(_MEASURE_CONTRAST)
        assert poor == []
        assert measured > 80
        ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(int(part) for part in ground[4:-1].split(",")) > 3 * 128
        assert light == (scheme == "light")


_MEASURE_CONTRAST = """(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b]
    .map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const color = parse(getComputedStyle(one).backgroundColor);
      if (color.length === 3 || color[3] === 1) {
        return color;
      }
    }
    return [255, 255, 255];
  };
  const poor = [];
  let measured = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) {
      continue;
    }
    const style = getComputedStyle(node);
    const ink = parse(node instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [luminance(ink), luminance(ground(node))].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    measured += 1;
    if (ratio < 4.5) {
      poor.push(`${ratio.toFixed(2)} ${node.tagName}.${node.className} ${walker.currentNode.data}`);
    }
  }
  return [poor, measured];
})()"""
