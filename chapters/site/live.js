// Draws the live views of a page from the state that is stored in it. A view is an anywidget: a module whose `render`
// takes a model and an element. Here the model's `live` is false: what it is told reaches no kernel.

function modelOf(state) {
  const listeners = {};
  return {
    get: (name) => state[name],
    set: (name, value) => {
      state[name] = value;
      for (const listener of listeners[`change:${name}`] ?? []) listener();
    },
    save_changes: () => {},
    on: (event, listener) => (listeners[event] ??= new Set()).add(listener),
    off: (event, listener) => listeners[event]?.delete(listener),
  };
}

/** The picture and the table in front of a view say the same: they stay for readers without scripts, and folded. */
function fold(output) {
  const same = [];
  for (let other = output; (other = other.previousElementSibling)?.matches("img, .text_html:not(:has(.live-view))"); )
    same.unshift(other);
  if (!same.length) return;
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "The same as a picture and a table";
  details.append(summary, ...same);
  output.after(details);
}

async function draw(script) {
  const { module, style, state, buffers } = JSON.parse(script.textContent);
  for (const [path, data] of buffers) {
    const last = path.pop();
    path.reduce((part, name) => part[name], state)[last] =
      new DataView(Uint8Array.from(atob(data), (byte) => byte.charCodeAt(0)).buffer);
  }
  // A page that was opened from a file may not import another file: the module is in the page.
  const address = URL.createObjectURL(new Blob([module], { type: "text/javascript" }));
  const { default: view } = await import(address);
  URL.revokeObjectURL(address);
  const sheet = document.createElement("style");
  sheet.textContent = style;
  const el = document.createElement("div");
  script.after(sheet, el);
  await view.render({ model: modelOf({ ...state, live: false }), el });
  fold(script.closest(".output"));
}

addEventListener("DOMContentLoaded", () => document.querySelectorAll("script.live-view").forEach(draw));
