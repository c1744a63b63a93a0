// The nodes that save a file: placeholders in their names, as in stock save nodes, and the file's name on the node afterwards.
import { app } from "../../scripts/app.js";

const SAVES = new Set(["ConceptKitSaveDecomposition", "ConceptKitSaveEdit", "ConceptKitSaveEditLora", "ConceptKitSaveEmbedding"]);

/** The read-only field that shows the saved file's name; it is part of neither workflows nor prompts. */
function field(node) {
  const found = node.widgets?.find((widget) => widget.name === "saved");
  if (found) return found;
  const input = document.createElement("input");
  input.readOnly = true;
  input.placeholder = "the file's name, once saved";
  input.title = "Select to copy";
  input.style.cssText = "width: 100%; box-sizing: border-box; font-size: 12px; user-select: text";
  input.className = "comfy-multiline-input";
  input.addEventListener("focus", () => input.select());
  const widget = node.addDOMWidget("saved", "conceptkit-saved", input, {
    serialize: false,
    hideOnZoom: false,
    getValue: () => input.value,
    setValue: (value) => (input.value = value ?? ""),
    margin: 4,
    getMinHeight: () => 32,
    getMaxHeight: () => 32,
  });
  widget.serialize = false;
  return widget;
}

function show(node, output) {
  const name = output?.text?.[0];
  if (name) field(node).value = name;
}

app.registerExtension({
  name: "ConceptKit.Saves",
  nodeCreated(node) {
    if (!SAVES.has(node.comfyClass)) return;
    const name = node.widgets.find((widget) => widget.name === "name");
    // %Node.widget% and %date:…%, which stock save nodes replace in the browser, too.
    name.serializeValue = () => window.comfyAPI.utils.applyTextReplacements(app, name.value);
    field(node);
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      show(this, output);
    };
  },
  // A workflow that is opened again, or a run that is looked at in the history.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.rootGraph.getNodeById(id);
      if (SAVES.has(node?.comfyClass)) show(node, output);
    }
  },
});
