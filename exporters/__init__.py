"""ONNX files from framework models: one module per framework, the only place in this repository that imports one.

A model goes in by name; out comes a checked ONNX file with its preprocessing and labels in the metadata. Run from the
repository root, with the `export` extra installed: `python -m exporters --help`. A new framework is one module with
`add_arguments(parser)` and `export(args)`, and one line in `EXPORTERS`. Modules are imported when asked for, because
frameworks are heavy and their pins disagree.
"""

EXPORTERS = {
    "efficientnet-lite0": ("efficientnet_lite", "EfficientNet-Lite0 with its ImageNet weights, as shipped in models/"),
    "torchvision": ("torch_vision", "any classifier of torchvision, with trained or seeded random weights"),
    "timm": ("timm_models", "any classifier of timm, likewise"),
    "torch": ("torch_callable", "any PyTorch classifier of yours, as module:callable"),
    "keras": ("keras_models", "keras.applications or a .keras file, on TensorFlow or JAX"),
    "tflite": ("tflite", "a .tflite file, float or int8"),
    "flax": ("flax_models", "a Flax nnx module of yours, as module:callable"),
    "same-network": ("same_network", "one small network with the same weights from torch, keras, flax or paddle"),
    "paddle": ("paddle_models", "any classifier of paddle.vision"),
}
