"""A live view in a browser without JupyterLab: the page asks a widget in this process."""

import base64
import json
from collections.abc import Sequence
from importlib import resources

from vitgal.runs import plain
from vitgal.viz.instrument import InstrumentWidget

# A stand-in for anywidget's model: messages go to Python and back as JSON and base64.
MODEL = """
const letters = (bytes) => Array.from(new Uint8Array(bytes), (b) => String.fromCharCode(b));
const text = (bytes) => btoa(letters(bytes).join(""));
const view = (data) => new DataView(Uint8Array.from(atob(data), (c) => c.charCodeAt(0)).buffer);
const listeners = {};
window.listeners = listeners;
const model = {
  on: (name, act) => (listeners[name] = act),
  send: async (content, _, buffers) => {
    const answer = await window.ask([content, buffers.map(text)]);
    if (answer) listeners["msg:custom"](answer[0], answer[1].map(view));
  },
};
const source = new KernelSource(model);
const [{ document: data }] = await source.ask({ kind: "document" });
window.state = mount(document.getElementById("instrument"), data, { source, start: START });
"""


class KernelPage:
    """A widget in a page of a browser, with everything that went wrong in it.

    silent: kinds of questions that get no answer. asked: the kinds of all questions.
    """

    def __init__(self, browser, widget: InstrumentWidget, silent: Sequence[str] = ()) -> None:
        self.widget, self.silent, self.asked = widget, silent, []
        self.page = browser.new_page(viewport={"width": 1300, "height": 1100})
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.expose_function("ask", self._answer)
        frontend = resources.files("vitgal.viz") / "frontend"
        script, style = (
            (frontend / f"instrument.{end}").read_text("utf-8") for end in ("js", "css")
        )
        start = json.dumps(dict(widget.start)).replace("<", "\\u003c")
        self.page.set_content(
            f'<!DOCTYPE html><html lang="en"><title>a view</title><style>{style}</style>'
            '<div id="instrument"></div>'
            f'<script type="module">{script}\n{MODEL.replace("START", start)}</script></html>'
        )
        self.page.wait_for_selector("header")

    def _answer(self, message: list) -> list | None:
        question, buffers = message
        self.asked.append(question["kind"])
        if question["kind"] in self.silent:
            return None
        sent = []
        self.widget.send = lambda reply, attached: sent.append((reply, attached))
        self.widget._answer(self.widget, question, [base64.b64decode(data) for data in buffers])
        ((reply, attached),) = sent
        return [plain(reply), [base64.b64encode(data).decode() for data in attached]]

    def contrast_and_names(self) -> list[str]:
        """What axe-core finds wrong."""
        from axe_playwright_python.sync_playwright import Axe

        results = Axe().run(self.page).response["violations"]
        return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in results]
