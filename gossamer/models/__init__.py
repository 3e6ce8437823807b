"""Networks and blocks: plain modules, registered with timm's registry when this is imported."""

from gossamer.models.build import build, load_weights
from gossamer.models.convfirst import convfirst_net
from gossamer.models.mobilenet import mobilenet_v1, resnext50, small_mobilenet
from gossamer.models.resnet import cifar_resnet, digits_resnet

__all__ = [
    "build",
    "cifar_resnet",
    "convfirst_net",
    "digits_resnet",
    "load_weights",
    "mobilenet_v1",
    "resnext50",
    "small_mobilenet",
]
