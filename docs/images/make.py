"""Draw the pictures of the documentation from the shipped model: `python docs/images/make.py`."""

from io import BytesIO
from pathlib import Path

from PIL import Image

import onnxcam
from onnxcam.compare import compare
from onnxcam.render.panel import panel

HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "models"


def main() -> None:
    model = onnxcam.load(MODELS / "efficientnet-lite0.onnx")
    picture = MODELS / "chelsea.png"

    one = model.explain(picture)
    save(one.overlay(size=448), "cat.jpg")

    deep = model.explain(picture, ["suggested"])
    drawn = [deep.overlay(name, size=320) for name in deep.maps]
    sizes = [f"{heat.shape[-2]} x {heat.shape[-1]}" for heat in deep.maps.values()]
    save(panel(drawn, sizes, columns=len(drawn)), "depths.jpg")

    other = model.explain(picture, targets=["tiger cat", "window screen"])
    drawn = [other.overlay(target=t, size=384, kind="signed") for t in (0, 1)]
    save(panel(drawn, [other.label(0, t) for t in (0, 1)], columns=2), "classes.jpg")

    model.preprocess = model.preprocess.override(resize="warp")
    methods = ["grad-cam", "relevance-cam", "relevance-map", "clrp1"]
    found = compare(model, HERE / "cat-and-cup.jpg", methods, ["-3", "-2", "-1"], ["Egyptian cat", "espresso"])
    drawn_to = BytesIO()
    found.figure().savefig(drawn_to, format="png", dpi=110)
    save(Image.open(drawn_to), "two-objects.jpg")


def save(image: Image.Image, name: str) -> None:
    image.convert("RGB").save(HERE / name, quality=88, optimize=True)


if __name__ == "__main__":
    main()
