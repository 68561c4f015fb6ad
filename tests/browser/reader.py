"""What a reader does with a notebook in JupyterLab: open it, run all cells, move a widget, look."""

from __future__ import annotations

import time

# The notebook's state, read from JupyterLab itself.
STATE = """() => {
  const panel = window.jupyterapp.shell.currentWidget;
  const kernel = panel?.sessionContext?.session?.kernel;
  const cells = panel?.content?.model?.sharedModel.toJSON().cells ?? [];
  const written = c => c.cell_type === 'code' && [c.source].flat().join('').trim();
  const code = cells.map((c, i) => ({...c, i})).filter(written);
  return {
    status: kernel?.status ?? 'none',
    waiting: code.filter(c => c.execution_count === null).length,
    n: code.length,
    errors: code.flatMap(c => c.outputs.filter(o => o.output_type === 'error')
                              .map(o => `cell ${c.i + 1}: ${o.ename}: ${o.evalue}`)),
  };
}"""
# All that a cell shows, but for the widgets' own controls and read-outs: pictures, canvases, text. Errors apart.
LOOK = """(area) => {
  const shown = [];
  for (const img of area.querySelectorAll('img')) shown.push(img.src);
  for (const canvas of area.querySelectorAll('canvas')) shown.push(canvas.toDataURL());
  for (const text of area.querySelectorAll('.jp-RenderedText, .jp-RenderedHTMLCommon, .widget-html-content'))
    shown.push(text.textContent);
  return shown.join('\\n');
}"""
# What breaks inside a widget shows as a traceback in its output, while the cell itself counts as fine.
TRACEBACKS = """(page) => [...page.querySelectorAll('.jp-RenderedText')].map(e => e.textContent)
  .filter(text => text.includes('Traceback (most recent call last)')).map(text => text.slice(-2000))"""
OUTPUT_AREA = ".jp-Cell-outputArea"
# Controls of ipywidgets. Tried in turn on each until what the cell shows changes.
KEYS = {
    ".noUi-handle": ("ArrowRight", "ArrowLeft", "PageUp", "PageDown", "End", "Home"),
    ".widget-dropdown select, .widget-select select": ("ArrowDown", "ArrowUp", "End", "Home"),
    ".widget-checkbox input": ("Space",),
    ".widget-radio input": ("ArrowDown", "ArrowUp"),
    ".widget-toggle-button:not(.widget-toggle-buttons *)": ("Space",),
    ".widget-toggle-buttons button:not(.mod-active)": ("Space",),
    ".widget-button:not(.widget-toggle-buttons *)": ("Space",),
}


def open_notebook(page, address: str) -> None:
    page.goto(address)
    page.wait_for_function(
        "() => window.jupyterapp?.shell?.currentWidget?.content?.model?.cells?.length", timeout=600_000
    )
    _wait(page, lambda state: state["status"] == "idle", 90, "the kernel to start")


def run_all_cells(page, seconds: float) -> None:
    """Through the menu, after forgetting the committed outputs; fails with the first error that a cell shows."""
    for menu, item in (("Edit", "Clear Outputs of All Cells"), ("Run", "Run All Cells")):
        page.locator("#jp-MainMenu .lm-MenuBar-itemLabel", has_text=menu).first.click()
        page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()

    def done(state):
        assert not state["errors"], "\n".join(state["errors"])
        return state["status"] == "idle" and not state["waiting"]

    _wait(page, done, seconds, "all cells to run")
    page.wait_for_timeout(300)  # pictures that the last message brought
    assert done(page.evaluate(STATE))
    tracebacks = page.locator("body").evaluate(TRACEBACKS)
    assert not tracebacks, tracebacks[0]


def _wait(page, condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition(state := page.evaluate(STATE)):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {state}"
        page.wait_for_timeout(300)


def controls(page) -> list[tuple[str, object]]:
    """Each control of each widget on the page that a reader can use: (a name for messages, its locator)."""
    found = []
    for selector in KEYS:
        for control in page.locator(selector).all():
            if control.is_visible() and control.is_enabled():
                box = control.locator("xpath=ancestor-or-self::*[contains(@class, 'widget-inline-hbox')][1]")
                label = box.first.inner_text().strip().splitlines()[0:1] if box.count() else []
                found.append((f"{selector.split()[0]} {label[0] if label else ''}".strip(), selector, control))
    return found


def move(page, selector: str, control, seconds: float = 20) -> str | None:
    """Move a control by keyboard. Returns the key that changed what its cell shows, or None if nothing did. Fails if
    the cell shows an error."""
    area = control.locator(f"xpath=ancestor::*[contains(@class, '{OUTPUT_AREA[1:]}')]").last
    control.scroll_into_view_if_needed()
    for key in KEYS[selector]:
        before = area.evaluate(LOOK)
        control.focus()
        page.keyboard.press(key)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            page.wait_for_timeout(150)
            after = area.evaluate(LOOK)
            tracebacks = area.evaluate(TRACEBACKS)
            assert not tracebacks, tracebacks[0]
            # A picture that is being replaced is gone for a moment: that isn't a change yet.
            if after and after != before:
                _wait(page, lambda state: state["status"] == "idle", seconds * 3, "the kernel after a widget moved")
                return key
    return None
