// What agreement.py is to Python: runs the model in WORK, says how long it took and how well each map agrees.

/**
 * @param ort the onnxruntime-web module
 * @param read (file name) -> Promise<ArrayBuffer>, from WORK
 * @returns lines of text
 */
export async function measure(ort, read, repeat = 5) {
  const about = JSON.parse(new TextDecoder().decode(await read('about.json')));
  const session = await ort.InferenceSession.create(new Uint8Array(await read('explained.onnx')), {
    executionProviders: ['wasm'],
  });
  const feeds = {
    [about.input.name]: new ort.Tensor('float32', new Float32Array(await read('input.f32')), about.input.shape),
    targets: new ort.Tensor('int64', [-1n], [1, 1]), // -1 is the predicted class
  };
  let outputs;
  const times = [];
  for (let i = 0; i <= repeat; i++) {
    const begun = performance.now();
    outputs = await session.run(feeds);
    times.push(performance.now() - begun);
  }
  const median = times.slice(1).sort((a, b) => a - b)[Math.floor(repeat / 2)];
  const lines = [`onnxruntime-web ${ort.env.versions.web}, WebAssembly: ${median.toFixed(0)} ms`];
  for (const [name, shape] of Object.entries(about.maps)) {
    const expected = new Float32Array(await read(`expected/${name}.f32`));
    const map = outputs[name].data;
    let difference = 0, size = 0;
    for (let i = 0; i < expected.length; i++) {
      difference += (map[i] - expected[i]) ** 2;
      size += expected[i] ** 2;
    }
    lines.push(`  ${name} ${shape.join('x')}: relative error ${Math.sqrt(difference / size).toExponential(1)}`);
  }
  return lines;
}
