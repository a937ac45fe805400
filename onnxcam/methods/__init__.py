"""Methods by name: how taps and relevance are combined into a map. Most are one line; all before it is shared."""

from __future__ import annotations

from onnxcam.methods import (
    cams,
    combined,
    lrp,
    on_host,
    perturbation,
    relevance_cam,
    relevance_map,
    rollout,
    sampled,
    scored,
)
from onnxcam.methods.base import INPUT, Combine, Method, Needs, raw
from onnxcam.named import named

__all__ = ["INPUT", "METHODS", "Method", "method"]


def _by_gradient(
    name: str,
    combine: Combine,
    weighs_channels: bool,
    about: str,
    needs: Needs | None = None,
    at_input: bool = False,
    composite: str = "gradient",
) -> Method:
    """A method of the gradient of the logit itself."""
    return Method(name, combine, composite, "one-hot", weighs_channels, about, needs=needs, at_input=at_input)


_RELEVANCE = ("relevance_cam", "contrast")  # composite and start
_GRADIENT = ("gradient", "one-hot")

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        # -- relevance
        Method(
            "relevance-cam",
            relevance_cam.combine,
            *_RELEVANCE,
            True,
            "channels weighted by the spatial mean of their relevance (Lee et al. 2021)",
        ),
        Method(
            "contrast-map",
            lrp.combine,
            "contrast_map",
            "contrast",
            False,
            "what speaks for the class more than for others: relevance, channels summed; at the last layer weighted by "
            "channel; recommended, see docs/evidence.md",
            combine_apart=relevance_cam.combine,
        ),
        Method(
            "lrp",
            lrp.combine,
            *_RELEVANCE,
            False,
            "the relevance of a layer, channels summed; of each feature where there is no map (Bach et al. 2015)",
            vectors=True,
        ),
        Method(
            "relevance-map",
            relevance_map.positive,
            *_RELEVANCE,
            False,
            "the positive part of the relevance of a layer, channels summed",
        ),
        Method(
            "relevance-layer-cam",
            relevance_map.times_activation,
            *_RELEVANCE,
            True,
            "positive relevance times activation, channels summed: LayerCAM with relevance for the gradient",
        ),
        Method(
            "channel-relevance",
            lrp.by_channel,
            *_RELEVANCE,
            False,
            "the relevance of each channel of a layer: which concepts mattered (Achtibat et al. 2023)",
            vectors=True,
            channels=True,
        ),
        Method(
            "sglrp",
            lrp.combine,
            "relevance_cam",
            "softmax-gradient",
            False,
            "LRP from the gradient of the class probability: other classes count against it (Iwana et al. 2019)",
            vectors=True,
        ),
        Method(
            "rap",
            lrp.combine,
            "rap",
            "logit",
            False,
            "relevance in which little influence counts against the class; take --layer input (Nam et al. 2020)",
            vectors=True,
        ),
        combined.Contrasted(
            "clrp1",
            raw,
            "relevance_cam",
            "logit",
            False,
            "relevance of the class less that of all other classes, each as a share (Gu et al. 2018)",
            dual="others",
        ),
        combined.Contrasted(
            "clrp2",
            raw,
            "relevance_cam",
            "logit",
            False,
            "relevance of the class less that of its negated weights, each as a share (Gu et al. 2018)",
            dual="negated",
        ),
        # -- class activation maps
        _by_gradient(
            "cam", cams.cam, True, "weights of the classifier times channels (Zhou et al. 2016)", cams.needs_linear_head
        ),
        _by_gradient("grad-cam", cams.grad_cam, True, "channels weighted by mean gradients (Selvaraju et al. 2017)"),
        _by_gradient(
            "grad-cam++",
            cams.grad_cam_plus_plus,
            True,
            "channels weighted by their positive gradients, weighted in turn (Chattopadhay et al. 2018)",
        ),
        sampled.Noisy(
            "smooth-grad-cam++",
            raw,
            *_GRADIENT,
            True,
            "Grad-CAM++ of gradients averaged over noisy inputs (Omeiza et al. 2019)",
            finish=sampled.plus_plus,
            powers=3,
        ),
        _by_gradient(
            "xgrad-cam", cams.xgrad_cam, True, "channels weighted by gradient times activation (Fu et al. 2020)"
        ),
        _by_gradient("hirescam", cams.hires_cam, False, "gradient times activation (Draelos and Carin 2020)"),
        _by_gradient("layercam", cams.layer_cam, True, "positive gradient times activation (Jiang et al. 2021)"),
        _by_gradient(
            "grad-cam-elementwise",
            cams.element_wise,
            False,
            "positive part of gradient times activation, cell by cell (pytorch-grad-cam)",
        ),
        on_host.OfActivations(
            "eigen-cam",
            raw,
            *_GRADIENT,
            True,
            "activations along their first singular vector; the same for every class (Muhammad and Yeasin 2020)",
            reduce=on_host.eigen_cam,
        ),
        on_host.OnHost(
            "eigengrad-cam",
            raw,
            *_GRADIENT,
            False,
            "gradient times activation along its first singular vector (pytorch-grad-cam)",
            reduce=on_host.eigen_grad_cam,
        ),
        scored.scored(
            "score-cam",
            scored.ScoreCam,
            True,
            "channels weighted by the logit behind the picture they mask (Wang et al. 2020)",
        ),
        scored.scored(
            "ablation-cam",
            scored.AblationCam,
            True,
            "channels weighted by what the logit loses without them (Desai and Ramaswamy 2020)",
        ),
        scored.scored(
            "recipro-cam",
            scored.ReciproCam,
            False,
            "the probability of the class by one cell of the layer alone (Byun and Lee 2022)",
        ),
        combined.GuidedGradCam(
            "guided-grad-cam",
            cams.grad_cam,
            *_GRADIENT,
            True,
            "Grad-CAM of a layer, enlarged, times guided backpropagation (Selvaraju et al. 2017)",
        ),
        # -- gradients
        _by_gradient(
            "saliency",
            cams.saliency,
            False,
            "largest gradient of a cell's channels (Simonyan et al. 2014)",
            at_input=True,
        ),
        _by_gradient(
            "input-x-gradient",
            cams.times_gradient,
            False,
            "gradient times value, signed (Shrikumar et al. 2016)",
            at_input=True,
        ),
        sampled.Noisy(
            "smoothgrad",
            raw,
            *_GRADIENT,
            False,
            "largest gradient of a cell's channels, averaged over noisy inputs (Smilkov et al. 2017)",
            at_input=True,
            finish=sampled.largest,
        ),
        sampled.Noisy(
            "vargrad",
            raw,
            *_GRADIENT,
            False,
            "variance of the gradient over noisy inputs (Adebayo et al. 2018)",
            at_input=True,
            finish=sampled.variance,
            powers=2,
        ),
        sampled.Path(
            "integrated-gradients",
            raw,
            *_GRADIENT,
            False,
            "gradients along the way from a flat input, times that way (Sundararajan et al. 2017)",
            at_input=True,
            finish=sampled.along_path,
        ),
        _by_gradient(
            "guided-backprop",
            cams.saliency,
            False,
            "largest gradient where rectifiers let only positive values back (Springenberg et al. 2015)",
            at_input=True,
            composite="guided",
        ),
        _by_gradient(
            "deconvnet",
            cams.saliency,
            False,
            "largest gradient where what comes back is rectified, not what went forward (Zeiler and Fergus 2014)",
            at_input=True,
            composite="deconvnet",
        ),
        combined.FullGrad(
            "fullgrad",
            raw,
            *_GRADIENT,
            False,
            "input times gradient, and bias times gradient of every convolution (Srinivas and Fleuret 2019)",
            at_input=True,
        ),
        # -- attention
        rollout.Rollout(
            "rollout",
            raw,
            *_GRADIENT,
            False,
            "attention multiplied through all blocks; the same for every class (Abnar and Zuidema 2020)",
            at_input=True,
        ),
        rollout.GradientRollout(
            "gradient-rollout",
            raw,
            *_GRADIENT,
            False,
            "attention weighted by its gradient, rolled out (Chefer et al. 2021)",
            at_input=True,
        ),
        # -- the model as a black box
        perturbation.black_box(
            "occlusion",
            perturbation.Occlusion,
            "what the logit loses where a box covers the input (Zeiler and Fergus 2014)",
        ),
        perturbation.black_box(
            "rise",
            perturbation.Rise,
            "random masks weighted by the probability behind them (Petsiuk et al. 2018)",
        ),
    )
}


def method(name: str | Method) -> Method:
    """The method of that name; underscores count as dashes.

    Raises:
        UsageError: there is none.
    """
    return name if isinstance(name, Method) else named("method", name, METHODS)
