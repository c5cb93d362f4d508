// Answers prompts with an artifact in transformers.js. Usage: node answer.mjs REQUEST.json; prints the answers as JSON.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const request = JSON.parse(await readFile(process.argv[2], "utf8"));
const installed = createRequire(join(request.packages, "package.json")).resolve("@huggingface/transformers");
const { AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, RawImage, Tensor, env } = await import(
  pathToFileURL(installed)
);
env.allowRemoteModels = false;
env.useFSCache = false;
const name = request.folder; // a whole path is read as it is, spaces included
const model = await AutoModelForImageTextToText.from_pretrained(name);
const tokenizer = await AutoTokenizer.from_pretrained(name);

async function pixelsOf({ pixels, image }) {
  if (pixels) {
    const bytes = await readFile(pixels.file);
    return new Tensor("float32", new Float32Array(new Uint8Array(bytes).buffer), pixels.shape);
  }
  if (!image) return null;
  const processor = await AutoProcessor.from_pretrained(name);
  return (await processor.image_processor(await RawImage.read(image))).pixel_values;
}

const answers = [];
for (const prompt of request.prompts) {
  const pixels = await pixelsOf(prompt);
  const shape = [1, prompt.ids.length];
  const found = await model.generate({
    input_ids: new Tensor("int64", BigInt64Array.from(prompt.ids, BigInt), shape),
    attention_mask: new Tensor("int64", new BigInt64Array(prompt.ids.length).fill(1n), shape),
    ...(pixels ? { pixel_values: pixels } : {}),
    max_new_tokens: request.max_new_tokens,
    do_sample: false,
  });
  const tokens = found.tolist()[0].slice(prompt.ids.length).map(Number);
  const text = tokenizer.decode(tokens, { skip_special_tokens: true });
  answers.push({ tokens, text, pixels: prompt.image ? Array.from(pixels.data) : null });
}
console.log(JSON.stringify(answers));
