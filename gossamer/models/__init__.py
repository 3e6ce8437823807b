"""Networks and blocks: plain modules, registered with timm's registry when this is imported."""

from gossamer.models.build import build, load_weights
from gossamer.models.resnet import cifar_resnet, digits_resnet

__all__ = ["build", "cifar_resnet", "digits_resnet", "load_weights"]
