/* Files to keep: the picture with its boxes at the size of the source, and all boxes of the reply as JSON.
 *
 * Both are made in the browser from what is shown; nothing is asked of the server. Part of one function, see
 * box_view.js.
 */

function listenForSaving() {
  parts.savePicture.addEventListener("click", savePicture);
  parts.saveJson.addEventListener("click", saveJson);
}

async function savePicture() {
  const picture = shownPicture();
  try {
    await parts.image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = picture.width;
    canvas.height = picture.height;
    const pen = canvas.getContext("2d");
    pen.drawImage(parts.image, 0, 0, picture.width, picture.height);
    paintMarks(pen, shownMarks(), picture);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    save(blob, `${stem(picture.name)}-boxes.png`); // null, which save refuses, where the canvas is too large
  } catch (error) {
    console.error(error);
    say(props.texts.not_saved);
  }
}

/** As `draw` in processing/boxes.py measures them: lines and letters grow with the picture, lines lie within boxes. */
function paintMarks(pen, marks, picture) {
  const side = Math.sqrt(picture.width * picture.height);
  const line = Math.max(1, Math.round(side / 200));
  const halo = Math.max(1, Math.round(line * HALO / LINE));
  for (const mark of marks) paintBox(pen, mark, line, halo, picture);
  const fontSize = Math.max(12, Math.round(side / 30));
  const font = plateFont(fontSize);
  const plates = placePlates(marks, picture, fontSize, textMeasure(font));
  pen.font = font;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  plates.forEach((plate, place) => {
    pen.fillStyle = marks[place].style.colour;
    pen.fillRect(plate.left, plate.top, plate.width, plate.height);
    pen.fillStyle = marks[place].style.ink;
    pen.fillText(plate.text, plate.left + plate.width / 2, plate.top + plate.height / 2);
  });
}

function paintBox(pen, mark, line, halo, picture) {
  const left = Math.min(mark.x1, picture.width - 1);
  const top = Math.min(mark.y1, picture.height - 1);
  const width = Math.min(mark.x2, picture.width - 1) + 1 - left;
  const height = Math.min(mark.y2, picture.height - 1) + 1 - top;
  const inner = [left + line / 2, top + line / 2, Math.max(width - line, 0), Math.max(height - line, 0)];
  pen.setLineDash([]);
  pen.strokeStyle = mark.style.ink;
  pen.lineWidth = line + 2 * halo;
  pen.strokeRect(...inner);
  pen.setLineDash(mark.style.dash.map((length) => length * line / LINE));
  pen.strokeStyle = mark.style.colour;
  pen.lineWidth = line;
  pen.strokeRect(...inner);
}

function saveJson() {
  const {pictures, boxes} = view.value;
  const list = boxes.map(({label, x1, y1, x2, y2, image}) => {
    const {name, width, height} = pictures[image] ?? {name: null, width: null, height: null};
    return {label: label ?? null, x1, y1, x2, y2, image, picture: name, width, height};
  });
  const text = `${JSON.stringify(list, null, 2)}\n`;
  save(new Blob([text], {type: "application/json"}), `${stem(shownPicture()?.name)}-boxes.json`);
}

/** A picture's name without its ending and what no file may be named with. */
function stem(name) {
  return oneLine(name).replace(/\.[^.]*$/, "").replace(/[\\/:*?"<>|]/g, "_") || "picture";
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still be reading
}
