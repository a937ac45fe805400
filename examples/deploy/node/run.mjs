// node run.mjs WORK
import { readFile } from 'node:fs/promises';
import * as ort from 'onnxruntime-web';
import { measure } from '../agreement.mjs';

const work = process.argv[2];
const read = async (name) => {
  const { buffer, byteOffset, byteLength } = await readFile(`${work}/${name}`);
  return buffer.slice(byteOffset, byteOffset + byteLength);
};
for (const line of await measure(ort, read)) console.log(line);
