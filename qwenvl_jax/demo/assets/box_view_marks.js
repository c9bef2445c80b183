/* How boxes look: their colours and dashes, where their plates stand, and both as SVG over the picture.
 *
 * The measures of a line and the places of plates are the same for the screen (SVG) and for the saved picture (canvas):
 * both call `stylesOf` and `placePlates`. Part of one function, see box_view.js.
 */

// Their number and that of the colours have no common divisor, so that styles repeat as late as they can.
const DASHES = [[], [9, 5], [2.5, 4], [12, 4, 3, 4], [5, 3]];
const LINE = 3; // pixels on the screen; the dashes are for a line of this width
const HALO = 1.5; // on either side of a line
const PLATE_FONT = 13;
const WIDEST_PLATE = 0.6; // of the surface; the table has the whole label
const DRAFT = {colour: "#ffffff", ink: "#000000", dash: [6, 4]};

/** For each box its colour, what is readable on that colour, and its dash. Those of one label look the same. */
function stylesOf(boxes, colours) {
  const numbers = new Map();
  return boxes.map((box, position) => {
    const key = box.label ?? position; // no label: a style of its own
    if (!numbers.has(key)) numbers.set(key, numbers.size);
    const number = numbers.get(key);
    const colour = colours[number % colours.length];
    return {colour, ink: inkOn(colour), dash: DASHES[number % DASHES.length]};
  });
}

/** Black or white, whichever has more contrast on "#rrggbb": 4.58 to 1 at least, as WCAG computes it. */
function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((start) => {
    const part = parseInt(colour.slice(start, start + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (luminance + 0.05) ** 2 > 0.05 * 1.05 ? "#000000" : "#ffffff";
}

/** A label as one line of visible characters; a model may write any. */
function oneLine(text) {
  return String(text ?? "").replace(/\p{C}/gu, " ").replace(/\s+/gu, " ").trim().slice(0, 200);
}

/** `text`, cut with "…" where `measure` says that it is wider than `width`. */
function fitted(text, width, measure) {
  if (measure(text) <= width) return text;
  const letters = Array.from(text);
  while (letters.length > 1 && measure(letters.join("") + "…") > width) letters.pop();
  return letters.join("") + "…";
}

/** The box with its corners in order and within a picture of this size. */
function within(box, width, height) {
  const clamp = (value, most) => Math.min(Math.max(value, 0), most);
  const xs = [clamp(box.x1, width), clamp(box.x2, width)].sort((a, b) => a - b);
  const ys = [clamp(box.y1, height), clamp(box.y2, height)].sort((a, b) => a - b);
  return {x1: xs[0], y1: ys[0], x2: xs[1], y2: ys[1]};
}

/** Where each mark's plate stands on a surface of `size`, and its text.
 *
 * `marks` have corners in pixels of the surface and a `text`. A plate stands above its box's top left corner, or where
 * it first meets no other; when it meets one everywhere, above all the same.
 */
function placePlates(marks, size, fontSize, measure) {
  const padding = Math.ceil(fontSize * 0.35);
  const height = Math.ceil(fontSize * 1.5);
  const plates = [];
  for (const mark of marks) {
    const text = fitted(mark.text, size.width * WIDEST_PLATE - 2 * padding, measure);
    const width = Math.ceil(measure(text)) + 2 * padding;
    const places = placesFor(mark, width, height, size.height).map(([left, top]) => ({
      left: Math.max(0, Math.min(left, size.width - width)),
      top: Math.max(0, Math.min(top, size.height - height)),
      width,
      height,
      text,
    }));
    plates.push(places.find((place) => !plates.some((other) => overlap(place, other))) ?? places[0]);
  }
  return plates;
}

/** Top left corners to try for a plate, the best first: about the box, then up and down in its column. */
function placesFor(mark, width, height, surfaceHeight) {
  const {x1, y1, x2, y2} = mark;
  const above = y1 >= height ? y1 - height : y1; // no room above: inside
  const places = [[x1, above], [x1, y2], [x2 - width, above], [x2 - width, y2]];
  places.push([x1, y1], [x1, y2 - height], [x2, y1], [x1 - width, y1]);
  for (let away = height; away < surfaceHeight; away += height) places.push([x1, above + away], [x1, above - away]);
  return places;
}

function overlap(one, other) {
  return one.left < other.left + other.width && other.left < one.left + one.width
    && one.top < other.top + other.height && other.top < one.top + one.height;
}

/** Sets only attributes that differ: an update while a reply streams costs next to nothing. */
function setAttributes(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    const text = String(value);
    if (node.getAttribute(name) !== text) node.setAttribute(name, text);
  }
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Makes `parent` have `count` children, made by `make`; those that are there stay. */
function keepChildren(parent, count, make) {
  while (parent.children.length > count) parent.lastElementChild.remove();
  while (parent.children.length < count) parent.append(make(parent.children.length));
}

function svgNode(name, ...children) {
  const node = document.createElementNS(parts.overlay.namespaceURI, name);
  node.append(...children);
  return node;
}

/** A box as two rectangles, the halo and the line on it. */
function rectanglePair() {
  const [halo, line] = [svgNode("rect"), svgNode("rect")];
  halo.classList.add("box-halo");
  line.classList.add("box-line");
  return svgNode("g", halo, line);
}

function setRectanglePair(group, corners, style) {
  const place = {
    x: corners.x1,
    y: corners.y1,
    width: Math.max(corners.x2 - corners.x1, 0.01), // SVG draws nothing that is 0 wide
    height: Math.max(corners.y2 - corners.y1, 0.01),
  };
  setAttributes(group.children[0], {...place, stroke: style.ink});
  setAttributes(group.children[1], {
    ...place, stroke: style.colour, fill: style.colour, "stroke-dasharray": style.dash.join(" ") || "none",
  });
}

/** The boxes of the shown picture and the one that the visitor draws, over the picture as large as it is now. */
function drawMarks() {
  const picture = shownPicture();
  if (!picture) return;
  setAttributes(parts.overlay, {viewBox: `0 0 ${picture.width} ${picture.height}`});
  const marks = shownMarks();
  keepChildren(parts.lines, marks.length, rectanglePair);
  marks.forEach((mark, place) => {
    const group = parts.lines.children[place];
    setAttributes(group, {"data-box": mark.position + 1});
    setRectanglePair(group, mark, mark.style);
  });
  const draft = draftMark(picture);
  drawDraft(draft, picture);
  drawPlates(draft ? [...marks, draft] : marks, picture);
  showLit();
}

/** The boxes that lie on the shown picture, each with its position in the reply. */
function shownMarks() {
  const picture = shownPicture();
  const styles = stylesOf(view.value.boxes, props.colours);
  return view.value.boxes.flatMap((box, position) => {
    if (box.image !== view.chosen) return [];
    const text = `${position + 1} ${oneLine(box.label)}`.trim();
    return [{...within(box, picture.width, picture.height), position, text, style: styles[position]}];
  });
}

function draftMark(picture) {
  if (!view.draft || view.draft.image !== view.chosen) return null;
  const [x1, y1, x2, y2] = view.draft.box;
  return {...within({x1, y1, x2, y2}, picture.width, picture.height), position: null, text: "?", style: DRAFT};
}

/** The box being drawn and the keyboard's crosshair. */
function drawDraft(draft, picture) {
  const cross = view.drawing ? view.cross : null;
  keepChildren(parts.draft, (draft ? 1 : 0) + (cross ? 2 : 0), rectanglePair);
  if (draft) {
    parts.draft.children[0].classList.remove("box-hair");
    setRectanglePair(parts.draft.children[0], draft, draft.style);
  }
  if (!cross) return;
  const [across, down] = Array.from(parts.draft.children).slice(-2);
  for (const hair of [across, down]) hair.classList.add("box-hair");
  setRectanglePair(across, {x1: 0, x2: picture.width, y1: cross.y, y2: cross.y}, {...DRAFT, dash: []});
  setRectanglePair(down, {x1: cross.x, x2: cross.x, y1: 0, y2: picture.height}, {...DRAFT, dash: []});
}

/** Plates in pixels of the screen, whatever the picture's size: each group undoes the overlay's scale. */
function drawPlates(marks, picture) {
  const screen = parts.stage.getBoundingClientRect();
  if (!screen.width || !screen.height) return; // hidden; the observer of sizes calls again
  const scale = {x: screen.width / picture.width, y: screen.height / picture.height};
  const onScreen = marks.map((mark) => ({
    ...mark, x1: mark.x1 * scale.x, x2: mark.x2 * scale.x, y1: mark.y1 * scale.y, y2: mark.y2 * scale.y,
  }));
  const font = plateFont(PLATE_FONT);
  const plates = placePlates(onScreen, screen, PLATE_FONT, textMeasure(font));
  keepChildren(parts.plates, plates.length, () => svgNode("g", svgNode("rect"), svgNode("text")));
  view.plates = plates.map((plate, place) => ({...plate, position: marks[place].position}));
  plates.forEach((plate, place) => {
    const {colour, ink} = marks[place].style;
    const [rectangle, text] = parts.plates.children[place].children;
    setAttributes(parts.plates.children[place], {
      "data-box": marks[place].position === null ? "" : marks[place].position + 1,
      transform: `translate(${plate.left / scale.x} ${plate.top / scale.y}) scale(${1 / scale.x} ${1 / scale.y})`,
    });
    setAttributes(rectangle, {width: plate.width, height: plate.height, fill: colour, stroke: ink});
    setAttributes(text, {x: plate.width / 2, y: plate.height / 2, fill: ink, style: `font: ${font}`});
    setText(text, plate.text);
  });
}

/** The page's own font in bold, for letters of this many pixels; also a canvas's `font`. */
function plateFont(size) {
  return `600 ${size}px ${getComputedStyle(parts.root).fontFamily || "sans-serif"}`;
}

function textMeasure(font) {
  view.ruler ??= document.createElement("canvas").getContext("2d");
  return (text) => {
    view.ruler.font = font;
    return view.ruler.measureText(text).width;
  };
}
