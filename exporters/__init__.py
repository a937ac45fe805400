"""ONNX files from framework models: one module per framework, the only place in this repository that imports one.

A model goes in by name; out comes a checked ONNX file with its preprocessing and labels in the metadata. Run from the
repository root, with the `export` extra installed: `python -m exporters --help`. A new framework is one module with
`add_arguments(parser)` and `export(args)`, and one line in `EXPORTERS`. Modules are imported when asked for, because
frameworks are heavy and their pins disagree.
"""

EXPORTERS = {
    "efficientnet-lite0": ("efficientnet_lite", "EfficientNet-Lite0 with its ImageNet weights, as shipped in models/"),
    "torchvision": ("torch_vision", "any classifier of torchvision, with trained or seeded random weights"),
}
