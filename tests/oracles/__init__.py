"""Independent references. Nothing in here imports onnxcam."""
