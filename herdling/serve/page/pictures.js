/**
 * Pictures on their way into a message: from a file, the clipboard or a drop, decoded, made small
 * enough to be kept in the browser, never trusted by their name or type.
 */

const LARGEST = 40e6; // bytes of a file
const SIDE = 1344; // pixels; the side of Llama 4's largest square canvas, 4 tiles of 336
const KEPT = 260e3; // characters of a data URI
const AS_IT_IS = ["image/png", "image/jpeg", "image/webp", "image/gif"];

/** File -> {name, url, width, height}. Throws Error with a sentence for the user. */
export async function readPicture(file) {
  if (file.size > LARGEST) throw new Error(`${file.name} has ${Math.round(file.size / 1e6)} MB; pictures of up to 40 MB are read`);
  const bitmap = await decode(file);
  const { width, height } = bitmap;
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const original = AS_IT_IS.includes(file.type) && scale === 1 ? await dataUri(file) : null;
  if (original && original.length <= KEPT) return { name: file.name || "picture", url: original, width, height };
  return { name: file.name || "picture", ...draw(bitmap, Math.round(width * scale), Math.round(height * scale)) };
}

async function decode(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    return decodeElement(file);
  }
}

/** SVG and whatever else only an <img> can read. */
async function decodeElement(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
    if (!image.width) throw new Error("no size");
    return image;
  } catch {
    throw new Error(`${file.name || "the file"} is not a picture that this browser can read`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

const dataUri = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

/** PNG where it stays small (screenshots, drawings), else JPEG on white, at falling quality. */
function draw(bitmap, width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.max(1, width), Math.max(1, height)];
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const size = { width: canvas.width, height: canvas.height };
  const exact = canvas.toDataURL("image/png");
  if (exact.length <= KEPT) return { url: exact, ...size };
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (const quality of [0.85, 0.7]) {
    const url = canvas.toDataURL("image/jpeg", quality);
    if (url.length <= KEPT) return { url, ...size };
  }
  return { url: canvas.toDataURL("image/jpeg", 0.5), ...size };
}
