/* The boxes as a table, and what lights up: hovering or focusing a row shows its box, and the other way round.
 *
 * Part of one function, see box_view.js.
 */

const CORNERS = ["x1", "y1", "x2", "y2"];

/** The table's columns; that of the picture only where there are several. */
function columns() {
  const picture = view.value.pictures.length > 1 ? ["picture"] : [];
  return ["number", "line", "label", ...picture, ...CORNERS];
}

function fillTable() {
  const {boxes} = view.value;
  const names = columns();
  parts.table.hidden = boxes.length === 0;
  parts.noBoxes.hidden = boxes.length > 0;
  setText(parts.caption, props.texts.caption);
  if (parts.head.dataset.columns !== names.join()) { // other columns: the rows are of no use either
    parts.rows.replaceChildren();
    parts.head.replaceChildren(...names.map(headCell));
    parts.head.dataset.columns = names.join();
  }
  names.forEach((name, place) => setText(parts.head.children[place], props.texts[`column_${name}`]));
  keepChildren(parts.rows, boxes.length, (position) => newRow(position, names));
  const styles = stylesOf(boxes, props.colours);
  boxes.forEach((box, position) => fillRow(parts.rows.children[position], box, position, styles[position]));
}

function headCell(name) {
  const cell = document.createElement("th");
  cell.scope = "col";
  cell.classList.toggle("box-number", CORNERS.includes(name));
  return cell;
}

/** A row of empty cells. Its number is a button, so that keys reach the row; it shows the picture of its box. */
function newRow(position, names) {
  const row = document.createElement("tr");
  for (const name of names) {
    const cell = document.createElement(name === "number" ? "th" : "td");
    if (name === "number") cell.scope = "row";
    cell.dataset.column = name;
    cell.classList.toggle("box-number", CORNERS.includes(name));
    if (name === "number") cell.append(rowButton(position));
    if (name === "line") cell.append(swatch());
    if (name === "picture") cell.append(document.createElement("span"), " "); // its number, all that narrow columns show
    if (name === "label" || name === "picture") cell.append(document.createElement("bdi"));
    row.append(cell);
  }
  row.addEventListener("pointerenter", () => light(position));
  row.addEventListener("pointerleave", () => light(null));
  row.addEventListener("focusin", () => light(position));
  row.addEventListener("focusout", () => light(null));
  return row;
}

function rowButton(position) {
  const button = document.createElement("button");
  button.type = "button";
  button.addEventListener("click", () => {
    choose(view.value.boxes[position].image);
    light(position);
  });
  return button;
}

function swatch() {
  const [halo, line] = [svgNode("line"), svgNode("line")];
  for (const node of [halo, line]) setAttributes(node, {x1: 2, x2: 38, y1: 5, y2: 5});
  setAttributes(halo, {"stroke-width": LINE + 2 * HALO});
  setAttributes(line, {"stroke-width": LINE});
  const drawing = svgNode("svg", halo, line);
  setAttributes(drawing, {viewBox: "0 0 40 10", width: 40, height: 10, "aria-hidden": "true", class: "box-swatch"});
  setAttributes(drawing, {preserveAspectRatio: "xMinYMid slice"}); // where narrower, cut off and not made smaller
  return drawing;
}

function fillRow(row, box, position, style) {
  const picture = view.value.pictures[box.image];
  const label = oneLine(box.label);
  for (const cell of row.children) {
    const name = cell.dataset.column;
    if (name === "number") {
      setText(cell.firstChild, String(position + 1));
      const spoken = filled(props.texts.row, {number: position + 1, label: label || props.texts.no_label});
      setAttributes(cell.firstChild, {"aria-label": spoken});
    } else if (name === "line") {
      setAttributes(cell.firstChild.children[0], {stroke: style.ink});
      const dash = style.dash.join(" ") || "none";
      setAttributes(cell.firstChild.children[1], {stroke: style.colour, "stroke-dasharray": dash});
    } else if (name === "label") {
      setText(cell.firstChild, label || props.texts.no_label);
      cell.classList.toggle("box-faint", !label);
    } else if (name === "picture") {
      setText(cell.firstChild, String(box.image + 1));
      setText(cell.lastChild, oneLine(picture?.name));
    } else {
      setText(cell, String(box[name]));
    }
  }
}

/** Lights the box at `position` in the reply, on the picture and in the table; none with null. */
function light(position) {
  view.lit = position;
  showLit();
}

function showLit() {
  const lit = view.lit === null ? null : String(view.lit + 1);
  const onPicture = [...parts.lines.children, ...parts.plates.children];
  const there = onPicture.some((group) => lit !== null && group.dataset.box === lit);
  for (const group of onPicture) {
    group.classList.toggle("box-lit", there && group.dataset.box === lit);
    group.classList.toggle("box-dimmed", there && group.dataset.box !== lit);
  }
  Array.from(parts.rows.children).forEach((row, place) => row.classList.toggle("box-lit", place === view.lit));
}

/** The position of the box under a point of the screen: by its plate, else the smallest box that holds the point. */
function boxAt(clientX, clientY) {
  const picture = shownPicture();
  if (!picture) return null;
  const stage = parts.stage.getBoundingClientRect();
  const [left, top] = [clientX - stage.left, clientY - stage.top];
  const plate = view.plates.find((one) => (
    left >= one.left && left <= one.left + one.width && top >= one.top && top <= one.top + one.height
  ));
  if (plate) return plate.position;
  const near = 4; // pixels beside the line that count as on it
  const [x, y] = [left / stage.width * picture.width, top / stage.height * picture.height];
  const [aside, above] = [near / stage.width * picture.width, near / stage.height * picture.height];
  const under = shownMarks().filter((mark) => (
    x >= mark.x1 - aside && x <= mark.x2 + aside && y >= mark.y1 - above && y <= mark.y2 + above
  ));
  const area = (mark) => (mark.x2 - mark.x1) * (mark.y2 - mark.y1);
  under.sort((one, other) => area(one) - area(other));
  return under.length ? under[0].position : null;
}

function watchPointerOverPicture() {
  const lightUnder = (event) => {
    if (!view.drawing) light(boxAt(event.clientX, event.clientY));
  };
  parts.stage.addEventListener("pointermove", lightUnder);
  parts.stage.addEventListener("pointerdown", lightUnder); // a finger has no hover
  parts.stage.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") light(null);
  });
}
