"""What tf_keras calls its own, so that a configuration can be judged without importing it.

A test compares these lists with the installed tf_keras. A name that is missing here makes an answer
undetermined, never clean.
"""

from __future__ import annotations


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


BATCHNORM = names(
    """
    BatchNormalization BatchNormalizationBase BatchNormalizationV1 BatchNormalizationV2
    SyncBatchNormalization
    """
)
NORMALIZATION = BATCHNORM | names(
    """
    GroupNormalization LayerNormalization Normalization SpectralNormalization UnitNormalization
    """
)

# What tf_keras knows by these names, and rebuilds from the configuration alone.
LAYERS = NORMALIZATION | names(
    """
    AbstractRNNCell Activation ActivityRegularization Add AddLoss AddMetric AdditiveAttention
    AlphaDropout Attention Average AveragePooling1D AveragePooling2D AveragePooling3D AvgPool1D
    AvgPool2D AvgPool3D BaseRandomLayer Bidirectional CategoryEncoding CenterCrop ClassMethod
    Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose ConvLSTM1D
    ConvLSTM2D ConvLSTM3D ConvLSTMCell Convolution1D Convolution1DTranspose Convolution2D
    Convolution2DTranspose Convolution3D Convolution3DTranspose Cropping1D Cropping2D Cropping3D
    CuDNNGRU CuDNNLSTM Dense DenseFeatures DepthwiseConv1D DepthwiseConv2D DeviceWrapper
    Discretization Dot Dropout DropoutWrapper ELU EinsumDense Embedding Flatten Functional GRU
    GRUCell GRUCellV1 GRUCellV2 GRUV1 GRUV2 GaussianDropout GaussianNoise GlobalAveragePooling1D
    GlobalAveragePooling2D GlobalAveragePooling3D GlobalAvgPool1D GlobalAvgPool2D
    GlobalAvgPool3D GlobalMaxPool1D GlobalMaxPool2D GlobalMaxPool3D GlobalMaxPooling1D
    GlobalMaxPooling2D GlobalMaxPooling3D HashedCrossing Hashing Identity InputLayer
    InstanceMethod InstanceProperty IntegerLookup LSTM LSTMCell LSTMCellV1 LSTMCellV2 LSTMV1
    LSTMV2 Lambda Layer LeakyReLU LinearModel LocallyConnected1D LocallyConnected2D Masking
    MaxPool1D MaxPool2D MaxPool3D MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum Model
    MultiHeadAttention Multiply PReLU Permute RNN RandomBrightness RandomContrast RandomCrop
    RandomFlip RandomFourierFeatures RandomHeight RandomRotation RandomTranslation RandomWidth
    RandomZoom ReLU RepeatVector Rescaling Reshape ResidualWrapper Resizing SeparableConv1D
    SeparableConv2D SeparableConvolution1D SeparableConvolution2D SequenceFeatures Sequential
    SharpnessAwareMinimization SimpleRNN SimpleRNNCell SlicingOpLambda Softmax SpatialDropout1D
    SpatialDropout2D SpatialDropout3D StackedRNNCells StringLookup Subtract TFOpLambda
    TensorFlowOpLayer TextVectorization ThresholdedReLU TimeDistributed UpSampling1D
    UpSampling2D UpSampling3D WideDeepModel Wrapper ZeroPadding1D ZeroPadding2D ZeroPadding3D
    """
)
# Their helpers, by class and (in older files) by function name. None can hold a layer.
HELPERS = names(
    """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity LecunNormal LecunUniform
    Ones Orthogonal RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros constant
    glorot_normal glorot_uniform he_normal he_uniform identity lecun_normal lecun_uniform ones
    orthogonal random_normal random_uniform truncated_normal variance_scaling zeros one zero
    normal uniform L1 L1L2 L2 OrthogonalRegularizer l1 l1_l2 l2 orthogonal_regularizer MaxNorm
    MinMaxNorm NonNeg RadialConstraint UnitNorm max_norm maxnorm min_max_norm non_neg nonneg
    radial_constraint unit_norm unitnorm Policy PolicyV1
    """
)
ACTIVATIONS = names(
    """
    elu exponential gelu hard_sigmoid linear mish relu selu sigmoid silu softmax softplus
    softsign swish tanh
    """
)
