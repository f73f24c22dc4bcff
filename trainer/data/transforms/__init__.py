"""Augmentations: one class each, with its recipe keys and its own random stream.

The imports register the classes. Augmentations of images are applied in the order of the imports.
"""

# isort: off
from trainer.data.transforms import crop as crop
from trainer.data.transforms import flip as flip
from trainer.data.transforms import auto_augment as auto_augment
from trainer.data.transforms import random_erasing as random_erasing
from trainer.data.transforms import mixup as mixup
