/* The visitor draws a box to ask about: with the mouse, a finger, or the keys. Ends in trigger('select', ...).
 *
 * `view.drawing` says that the toggle is on; `view.drag` is a drag under way, `view.cross` and `view.corner` the keys'
 * crosshair and first corner, `view.draft` what is drawn so far, which stays until boxes change. Part of one function,
 * see box_view.js.
 */

const SMALLEST = 3; // pixels on the screen; less is a slip of the hand
const STEPS = 200; // that many presses of an arrow key cross the picture's longer side
const LARGER = 10; // times a step, with Shift
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

function listenForDrawing() {
  parts.draw.addEventListener("click", () => setDrawing(!view.drawing));
  parts.stage.addEventListener("pointerdown", startDrag);
  parts.stage.addEventListener("pointermove", continueDrag);
  parts.stage.addEventListener("pointerup", endDrag);
  parts.stage.addEventListener("pointercancel", cancelDrag);
  parts.root.addEventListener("keydown", pressKey);
}

/** Turns drawing on or off. On, the picture has the focus: its keys are the crosshair's. */
function setDrawing(on) {
  if (view.drawing === on) return;
  view.drawing = on;
  view.cross = view.corner = view.drag = null;
  parts.draw.setAttribute("aria-pressed", String(on));
  parts.stage.classList.toggle("box-drawing", on);
  parts.hint.hidden = !on;
  if (on) {
    light(null);
    parts.stage.setAttribute("role", "application"); // arrow keys reach us through a screen reader
    parts.stage.tabIndex = 0;
    parts.stage.focus({preventScroll: true});
  } else {
    parts.stage.setAttribute("role", "group");
    parts.stage.removeAttribute("tabindex");
  }
  say("");
  drawMarks();
}

/** A point of the screen in source pixels of the shown picture. */
function sourcePoint(event) {
  const stage = parts.stage.getBoundingClientRect();
  const picture = shownPicture();
  const along = (distance, length, pixels) => Math.round(Math.min(Math.max(distance / length, 0), 1) * pixels);
  return {
    x: along(event.clientX - stage.left, stage.width, picture.width),
    y: along(event.clientY - stage.top, stage.height, picture.height),
  };
}

function startDrag(event) {
  if (!view.drawing || view.drag || event.button !== 0) return;
  event.preventDefault(); // selects no text
  parts.stage.focus({preventScroll: true});
  parts.stage.setPointerCapture(event.pointerId);
  view.cross = view.corner = null;
  view.drag = {pointer: event.pointerId, from: sourcePoint(event), x: event.clientX, y: event.clientY, before: view.draft};
}

function continueDrag(event) {
  if (view.drag?.pointer !== event.pointerId) return;
  setDraft(view.drag.from, sourcePoint(event));
}

function endDrag(event) {
  if (view.drag?.pointer !== event.pointerId) return;
  const {from, x, y} = view.drag;
  if (Math.abs(event.clientX - x) < SMALLEST || Math.abs(event.clientY - y) < SMALLEST) {
    cancelDrag();
    return;
  }
  view.drag = null;
  setDraft(from, sourcePoint(event));
  announceDraft();
}

/** Back to what was drawn before this drag. */
function cancelDrag() {
  if (!view.drag) return;
  view.draft = view.drag.before;
  view.drag = null;
  drawMarks();
}

/** Shows the box between two points, at least a source pixel wide and high. */
function setDraft(one, other) {
  const picture = shownPicture();
  const [x1, x2] = ordered(one.x, other.x, picture.width);
  const [y1, y2] = ordered(one.y, other.y, picture.height);
  view.draft = {image: view.chosen, box: [x1, y1, x2, y2]};
  drawMarks();
}

function ordered(one, other, most) {
  const low = Math.min(one, other, most - 1);
  return [low, Math.max(one, other, low + 1)];
}

/** Drops what was drawn and all that was begun; the toggle stays as it is. */
function forgetDraft() {
  if (view.draft || view.drag || view.corner) say("");
  view.draft = view.drag = view.cross = view.corner = null;
}

function announceDraft() {
  const [x1, y1, x2, y2] = view.draft.box;
  say(filled(props.texts.chosen, {x1, y1, x2, y2}));
  trigger('select', {image: view.draft.image, box: view.draft.box});
}

function pressKey(event) {
  if (event.key === "Escape") {
    if (stepBack()) event.preventDefault();
  } else if (view.drawing && event.target === parts.stage && !view.drag) {
    if (event.key in ARROWS) moveCross(ARROWS[event.key], event.shiftKey);
    else if (event.key === "Enter") setCorner();
    else return;
    event.preventDefault(); // the page does not scroll
  }
}

/** What Esc undoes, the latest first: a drag or a first corner, the drawn box, the toggle. False for nothing. */
function stepBack() {
  if (view.drag) {
    cancelDrag();
  } else if (view.corner || view.draft) {
    view.corner = view.draft = null;
    drawMarks();
  } else if (view.drawing) {
    setDrawing(false);
    parts.draw.focus();
  } else {
    return false;
  }
  say(props.texts.cancelled);
  return true;
}

function moveCross([right, down], larger) {
  const picture = shownPicture();
  const step = Math.max(1, Math.round(Math.max(picture.width, picture.height) / STEPS)) * (larger ? LARGER : 1);
  const from = view.cross ?? middle(picture);
  view.cross = {
    x: Math.min(Math.max(from.x + right * step, 0), picture.width),
    y: Math.min(Math.max(from.y + down * step, 0), picture.height),
  };
  say(filled(props.texts.at, view.cross));
  if (view.corner) setDraft(view.corner, view.cross);
  else drawMarks();
}

function middle(picture) {
  return {x: Math.round(picture.width / 2), y: Math.round(picture.height / 2)};
}

/** Enter: the first corner, then the second, which must lie off it both ways. */
function setCorner() {
  view.cross ??= middle(shownPicture());
  if (!view.corner) {
    view.corner = view.cross;
    view.draft = null;
    say(filled(props.texts.corner, view.corner));
    drawMarks();
  } else if (view.corner.x === view.cross.x || view.corner.y === view.cross.y) {
    say(props.texts.too_small);
  } else {
    setDraft(view.corner, view.cross);
    view.corner = null;
    announceDraft();
  }
}
