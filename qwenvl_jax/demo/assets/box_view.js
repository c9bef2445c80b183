/* The picture with boxes, in the browser: takes each new value and brings the page to it.
 *
 * box_view.py joins this file to the others named box_view_*.js and gives them to Gradio, which runs them as one
 * function for each component on a page: `element`, `trigger`, `props` and `watch` are its arguments, and all state is
 * in its own `view`. The template is never filled with values. Nodes are made and changed here, and kept from one
 * value to the next, so that the picture does not flicker while a reply streams; all that comes from a model or a
 * visitor is set as text, never as HTML.
 */

const parts = Object.fromEntries(
  Array.from(element.querySelectorAll("[data-part]"), (node) => [node.dataset.part, node]),
);

const view = {
  value: {pictures: [], shown: null, boxes: []},
  chosen: null, // the number of the picture on show
  lit: null, // the position of the box that is hovered or has the focus
  plates: [], // where they are on the screen
  drawing: false, drag: null, cross: null, corner: null, draft: null, // see box_view_draw.js
};

function shownPicture() {
  return view.value.pictures[view.chosen] ?? null;
}

/** `text` with what stands in braces replaced by `words`. */
function filled(text, words) {
  return text.replace(/\{(\w+)\}/g, (all, name) => String(words[name] ?? all));
}

/** Shows it below the picture and has a screen reader say it. */
function say(text) {
  setText(parts.status, text);
}

function receive() {
  const before = view.value;
  const {pictures = [], shown = null, boxes = []} = props.value ?? {};
  view.value = {pictures, shown, boxes};
  const known = before.pictures[view.chosen]?.url;
  follow(before);
  if (known !== shownPicture()?.url) forgetDraft(); // it was for the other picture
  else if (!view.drag && JSON.stringify(boxes) !== JSON.stringify(before.boxes)) forgetDraft();
  if (view.lit !== null && view.lit >= boxes.length) view.lit = null;
  refresh();
}

/** Shows the picture that the server wants shown, or that a new box lies on; else what was on show. */
function follow(before) {
  const {pictures, shown, boxes} = view.value;
  const same = (box, place) => JSON.stringify(box) === JSON.stringify(before.boxes[place]);
  const arrived = boxes.filter((box, place) => !same(box, place) && box.image in pictures);
  const anew = pictures[0]?.url !== before.pictures[0]?.url; // another conversation
  if (!view.drag) { // the picture stays while a box is drawn on it
    if (shown in pictures && (anew || shown !== before.shown)) view.chosen = shown;
    if (arrived.length) view.chosen = arrived.at(-1).image;
  }
  if (!(view.chosen in pictures)) view.chosen = pictures.length ? pictures.length - 1 : null;
}

/** The visitor wants to see another picture. */
function choose(number) {
  if (number === view.chosen || !(number in view.value.pictures)) return;
  view.chosen = number;
  view.cross = view.corner = null;
  refresh();
}

/** Brings everything on the page to what `view` says. */
function refresh() {
  const picture = shownPicture();
  parts.noPicture.hidden = picture !== null;
  parts.body.hidden = picture === null;
  setWords();
  fillPictureButtons();
  fillTable();
  parts.saveJson.disabled = view.value.boxes.length === 0;
  if (picture === null) {
    setDrawing(false);
    parts.image.removeAttribute("src");
  } else {
    showPicture(picture);
    drawMarks();
    parts.savePicture.disabled = shownMarks().length === 0;
  }
}

function setWords() {
  const {texts} = props;
  setAttributes(parts.root, {"aria-label": texts.title});
  setAttributes(parts.pictures, {"aria-label": texts.pictures});
  setText(parts.noPicture, texts.no_picture);
  setText(parts.noBoxes, texts.no_boxes);
  setText(parts.hint, texts.hint);
  setText(parts.draw, texts.draw);
  setText(parts.savePicture, texts.save_picture);
  setText(parts.saveJson, texts.save_json);
}

function pictureTitle(number) {
  return filled(props.texts.picture, {number: number + 1, name: oneLine(view.value.pictures[number].name)});
}

function showPicture(picture) {
  setAttributes(parts.image, {src: picture.url, alt: pictureTitle(view.chosen)}); // the same address loads nothing
  setAttributes(parts.stage, {"aria-label": pictureTitle(view.chosen)});
  parts.stage.style.setProperty("--picture-width", picture.width);
  parts.stage.style.setProperty("--picture-height", picture.height);
}

/** A button with a thumbnail for each picture, where there are several. */
function fillPictureButtons() {
  const {pictures} = view.value;
  parts.pictures.hidden = pictures.length < 2;
  keepChildren(parts.pictures, parts.pictures.hidden ? 0 : pictures.length, pictureButton);
  Array.from(parts.pictures.children).forEach((button, number) => {
    const [thumbnail, title] = button.children;
    setAttributes(button, {"aria-pressed": number === view.chosen, title: pictureTitle(number)});
    setAttributes(thumbnail, {src: pictures[number].url});
    setText(title, pictureTitle(number));
  });
}

function pictureButton(number) {
  const button = document.createElement("button");
  button.type = "button";
  const thumbnail = document.createElement("img");
  thumbnail.alt = ""; // its name is beside it
  button.append(thumbnail, document.createElement("bdi"));
  button.addEventListener("click", () => choose(number));
  return button;
}

parts.hint.id = `${element.id}-hint`;
parts.stage.setAttribute("aria-describedby", parts.hint.id);
watchPointerOverPicture();
listenForDrawing();
listenForSaving();
watch(['value', 'texts'], receive);
new ResizeObserver(drawMarks).observe(parts.stage);
receive();
