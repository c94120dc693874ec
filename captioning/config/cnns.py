"""The CNNs that can compute the features: one table. All are from keras.applications, trained on ImageNet there.

A CNN sees an image as a grid of locations, each with its channels: the output of its last convolutional layer, before
any pooling of the whole image. Nothing else in the project knows a size of the image, the grid or the channels.
`captioning.images.cnn_loader` builds the CNNs of this table; docs/extending.md shows how to add one.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from captioning.base.cli import InputError

MAX_IMAGE_SIZE = 1024  # pixels; more is a typing error rather than a wish: the features of one image take megabytes


class CNN(NamedTuple):
    """A CNN, and the size of the images that it is given."""

    option: str  # the value of --cnn
    name: str  # its constructor in keras.applications; features.json has it too
    image_size: int  # pixels of both sides; in the table that of its ImageNet training
    grid_side: Callable[[int], int]  # locations on a side of the grid, by the image size
    num_channels: int
    # How pixels from 0 to 255 become its input: "tf": -1 to 1; "caffe": BGR without ImageNet's mean, both as in
    # `keras.applications.imagenet_utils.preprocess_input`; "inside": it takes the pixels, its first layers do the rest.
    preprocessing: str
    weights_file: str  # of ImageNet's weights without the top, as Keras names it
    images_per_second: float  # on two cores of a Xeon: InceptionV3's 22, times the ratio of docs/use.md
    layer: str | None = None  # whose output is used; None for the last one without the top

    @property
    def features_shape(self) -> tuple[int, int]:
        """The number of locations, row after row, and that of channels: (L, C)."""
        return self.grid_side(self.image_size) ** 2, self.num_channels

    @property
    def min_image_size(self) -> int:
        """The smallest image with a grid of 2x2; with one location there is nothing to attend to."""
        return next(size for size in range(MAX_IMAGE_SIZE) if self.grid_side(size) >= 2)

    @property
    def suffix(self) -> str:
        """What the name of a folder of features ends in: `_vgg19`, `_vgg19_448`, or nothing for the default CNN."""
        default = CNNS[self.option]
        size = f"_{self.image_size}" if self.image_size != default.image_size else ""
        return f"_{self.option}{size}" if size or default is not INCEPTION_V3 else ""

    def at(self, image_size: int | None) -> "CNN":
        """Returns the CNN for images of another size, None for its own; raises InputError if it does not take them."""
        if image_size is None:
            return self
        if not self.min_image_size <= image_size <= MAX_IMAGE_SIZE:
            raise InputError(
                f"image size {image_size}: expected {self.min_image_size} to {MAX_IMAGE_SIZE} pixels for {self.name}, "
                f"whose own size is {CNNS[self.option].image_size}"
            )
        return self._replace(image_size=image_size)

    def seconds(self, num_images: int) -> float:
        """Returns how long two cores compute; the time of a convolution grows with the number of pixels."""
        return num_images / self.images_per_second * (self.image_size / CNNS[self.option].image_size) ** 2


def _inception_v3_side(size: int) -> int:
    """Returns the side of the grid of InceptionV3, whose convolutions do not pad where they halve the image."""
    for shrinks in (2, 2, 0, 0, 0):  # the 3x3 convolutions after the first two take 2 locations away
        size = (size - 1) // 2 - shrinks
    return size


def _divide(divisor: int) -> Callable[[int], int]:
    """Returns the side of a grid that halvings make, each rounding down."""
    return lambda size: size // divisor


def _divide_up(divisor: int) -> Callable[[int], int]:
    """Returns the side of a grid that halvings by padded convolutions make, each rounding up."""
    return lambda size: -(-size // divisor)


_KERNELS = "weights_tf_dim_ordering_tf_kernels_notop.h5"
_MOBILENET_FILE = "weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5"
_TABLE = (
    CNN("inception_v3", "InceptionV3", 299, _inception_v3_side, 2048, "tf", f"inception_v3_{_KERNELS}", 22),
    # The 14x14 locations of Xu et al. 2015, section 4.3: the last block, before its max pooling.
    CNN("vgg19", "VGG19", 224, _divide(16), 512, "caffe", f"vgg19_{_KERNELS}", 8, layer="block5_conv4"),
    CNN("resnet50", "ResNet50", 224, _divide_up(32), 2048, "caffe", f"resnet50_{_KERNELS}", 30),
    CNN("resnet101_v2", "ResNet101V2", 224, _divide_up(32), 2048, "tf", f"resnet101v2_{_KERNELS}", 17),
    CNN("efficientnet_v2_s", "EfficientNetV2S", 384, _divide_up(32), 1280, "inside", "efficientnetv2-s_notop.h5", 13),
    CNN("convnext_tiny", "ConvNeXtTiny", 224, _divide(32), 768, "inside", "convnext_tiny_notop.h5", 5.5),
    CNN("mobilenet_v3_large", "MobileNetV3Large", 224, _divide_up(32), 960, "inside", _MOBILENET_FILE, 160),
)
CNNS = {cnn.option: cnn for cnn in _TABLE}
INCEPTION_V3 = CNNS["inception_v3"]
WEIGHTS_MEGABYTES = {  # of ImageNet's weights without the top
    "inception_v3": 88,
    "vgg19": 80,
    "resnet50": 95,
    "resnet101_v2": 171,
    "efficientnet_v2_s": 82,
    "convnext_tiny": 112,
    "mobilenet_v3_large": 13,
}


def cnn_of_manifest(manifest: Mapping[str, Any]) -> CNN:
    """Returns the CNN that the manifest of a cache names, for images of its size; raises InputError if none fits."""
    cnn = next((cnn for cnn in CNNS.values() if cnn.name == manifest["cnn"]), None)
    if cnn is None:
        raise InputError(
            f"cnn: expected {', '.join(each.name for each in CNNS.values())}, found {manifest['cnn'][:60]!r}"
        )
    cnn = cnn.at(manifest["image_size"])
    shape = list(cnn.features_shape)
    if manifest["shape"] != shape:
        raise InputError(f"shape: expected {shape}, found {str(manifest['shape'])[:60]}")
    return cnn
