"""Ops that onnxcam does not explain, on purpose, and why: the one place where the reasons are written.

An error says the sentence that `docs/operators.md` says. An op is here for what it is; a node in a form that its
operator or expansion does not take is refused there, in its own words.
"""

from __future__ import annotations

MICROSOFT = "com.microsoft"
ML = "ai.onnx.ml"
NCHWC = "com.microsoft.nchwc"
NHWC = "com.ms.internal.nhwc"

_SEQUENCE = "it makes or takes apart a list of tensors; export the model so that it works on tensors"
_LOOP = "it runs a graph again and again; export the model with the loop unrolled, or explain a layer behind it"
_BRANCH = (
    "which branch is taken is known when the model runs: `onnxcam explain` follows it, a compiled model cannot; or "
    "export the model without the condition"
)
_TREES = "what trees compare has no gradient and no weights to share relevance by: a perturbation method may do"
_TEXT = "it works on text, not on numbers"
_SIGNAL = "it is signal processing; explain a layer behind it, or the model, where it stands before one"
_POOL = "its positions come from regions that the graph proposes; explain a layer behind it"
_CLASSICAL = "it is a model of classical machine learning, not a layer of a network"
_TABLE = "it prepares rows of a table for a classical model; explain the model behind it"
_TRAINING = "it is for training; export the model for inference"
_GENERATES = "it generates text, token by token"
_CACHE = "it is a step of generating text, on keys and values of the past"
_LANGUAGE = "it is made for language models, and no picture goes through it"
_RAGGED = "it packs sequences of different lengths without their padding; keep the padding when optimising"
_SPARSE = "its attention leaves out blocks that are found while it runs"
_EXPERTS = "it sends each token to experts that are chosen while it runs"
_NARROW = "its weights are packed for one kernel; explain the model as it was before they were packed"
_ORDERED = "it is quantised for one processor, in a layout of its own; explain the float model"
_COMPILED = "it holds a network compiled for one processor, which cannot be looked into; explain the original model"
_COMPLEX = "it computes with complex numbers"
_UNSEEN = (
    "no classifier has been met with it; explain a layer behind it, take the model as a --black-box, or add it as "
    "docs/add-an-operator.md shows"
)
_NO_FLOW = "it hands out numbers that nothing seen flows through, and no network of pictures has it"

_BY_REASON: dict[tuple[str, str], str] = {
    ("", _SEQUENCE): "ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert "
    "SequenceLength SequenceMap SplitToSequence Optional OptionalGetElement OptionalHasElement",
    ("", _LOOP): "Loop Scan",
    ("", _BRANCH): "If",
    ("", _TEXT): "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
    ("", _SIGNAL): "DFT STFT MelWeightMatrix ImageDecoder",
    ("", _POOL): "MaxRoiPool",
    ("", _UNSEEN): "CumProd Det",
    ("", _NO_FLOW): "BitCast Unique",
    ("", _CACHE): "TensorScatter",
    ("", "it carries a state along the sequence, in a loop; no picture goes through it"): "LinearAttention",
    ("", "it has been dropped from ONNX; export the model again"): "DynamicSlice GivenTensorFill GRUUnit",
    ("", "ONNX Runtime puts it into its own graphs; explain the original model"): "MemcpyFromHost MemcpyToHost",
    ("", "it is a plugin of TensorRT; explain the model it was made from"): "DisentangledAttention_TRT "
    "EfficientNMS_TRT MultilevelCropAndResize_TRT PyramidROIAlign_TRT",
    (ML, _CLASSICAL): "LinearClassifier LinearRegressor SVMClassifier SVMRegressor",
    (ML, _TREES): "TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor",
    (ML, _TABLE): "ArrayFeatureExtractor Binarizer CastMap CategoryMapper DictVectorizer FeatureVectorizer Imputer "
    "LabelEncoder Normalizer OneHotEncoder Scaler ZipMap",
    (MICROSOFT, _GENERATES): "BeamSearch GreedySearch Sampling WhisperBeamSearch NGramRepeatBlock "
    "BifurcationDetector SpeculativePrefixCommit",
    (MICROSOFT, _CACHE): "DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention PagedAttention "
    "SparsePagedAttention CausalConvWithState ConvStateReplay VarlenCausalConvWithState GatedDeltaNet "
    "GatedDeltaNetStateReplay LinearAttention LinearAttentionGate Mamba2Verify",
    (MICROSOFT, _LANGUAGE): "EmbedLayerNormalization QEmbedLayerNormalization RelativePositionBias "
    "GatedRelativePositionBias GemmaRotaryEmbedding MRotaryEmbedding RMSNormRotary BranchwiseRMSNorm GatedRMSNorm "
    "GatedAdd EngramGate HyperConnectionLowRankMix HyperConnectionPostMix HyperConnectionPreMix NGramHashMapping "
    "VarlenNGramHashMapping TorchEmbedding AttnLSTM WordConvEmbedding DynamicTimeWarping UnfoldTensor",
    (MICROSOFT, _RAGGED): "PackedAttention PackedMultiHeadAttention RemovePadding RestorePadding GatherPacked",
    (MICROSOFT, _SPARSE): "SparseAttention DynamicSparseAttention LongformerAttention SparseAttentionIndexer "
    "PackedSparseAttentionIndexer PackedSparseAttentionIndexerMerge",
    (MICROSOFT, _EXPERTS): "MoE MoEPacked QMoE MoEGroupRouter RouterGateUpProj",
    (MICROSOFT, _NARROW): "MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight MatMulBnb4 MatMulFpQ4 "
    "MatMulNBitsMlp MatMulNBitsQLoRA MatMulNBitsQkv MatMulPacked GemmFloat8 GatherBlockQuantized QuantizeBFP "
    "DequantizeBFP SparseToDenseMatMul",
    (MICROSOFT, _ORDERED): "QOrderedAttention QOrderedGelu QOrderedLayerNormalization QOrderedLongformerAttention "
    "QOrderedMatMul QuantizeWithOrder DequantizeWithOrder",
    (MICROSOFT, "it computes in integers, and ONNX Runtime has no kernel for it on a CPU; explain the float model"): (
        "MulInteger ReduceSumInteger QLinearReduceMean"
    ),
    (MICROSOFT, "its integers have 16 bits, and their scale is not in the node; explain the float model"): (
        "MatMulInteger16"
    ),
    (MICROSOFT, "it is quantised anew for each input, in a loop; explain the float model"): "DynamicQuantizeLSTM",
    (MICROSOFT, _COMPILED): "EPContext Snpe",
    (MICROSOFT, _COMPLEX): "ComplexMul ComplexMulConj Rfft Irfft",
    (MICROSOFT, _UNSEEN): "CDist Inverse MaxpoolWithMask",
    (MICROSOFT, _POOL): "CropAndResize",
    (MICROSOFT, _TEXT): "Tokenizer MurmurHash3",
    (MICROSOFT, _NO_FLOW): "IsAllFinite Unique",
    (MICROSOFT, "it is an example"): "SampleOp",
    (NCHWC, "the file was saved after ONNX Runtime had laid it out in blocks of channels for one CPU; save it with "
     "ORT_ENABLE_EXTENDED instead of ORT_ENABLE_ALL, or explain the original model"): (
        "Conv MaxPool AveragePool GlobalMaxPool GlobalAveragePool ReorderInput ReorderOutput Upsample"
    ),
    (NHWC, "the file was saved after ONNX Runtime had laid it out for one accelerator, channels last; explain the "
     "original model"): (
        "BatchNormalization AveragePool GlobalAveragePool MaxPool GlobalMaxPool Conv ConvTranspose DepthToSpace "
        "GridSample InstanceNormalization LRN LpNormalization LpPool GlobalLpPool MaxRoiPool MaxUnpool PRelu Resize "
        "SpaceToDepth QLinearAveragePool QLinearConv QLinearConvTranspose"
    ),
    ("ai.onnx.preview.training", _TRAINING): "Adagrad Adam Gradient Momentum",
}  # fmt: skip

REFUSED: dict[tuple[str, str], str] = {
    (domain, op): reason for (domain, reason), listed in _BY_REASON.items() for op in listed.split()
}
