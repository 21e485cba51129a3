"""What a recipe does to frames, in torchvision's words: the reference that a platform's own scaling is compared with.

Shapes: T frames, Y X pixels, C channels, P side of the crop
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kinoray.network import InputSpec

__all__ = ["preprocess"]


def preprocess(frames_TYXC: Tensor, spec: InputSpec) -> Tensor:
    """Resize, crop and scale frames uint8 [T, Y, X, 3] as spec and its recipe say: float [T, 3, P, P].

    Resized frames are uint8 again, as everywhere in the field.
    """
    recipe = spec.recipe
    frames_TCYX = frames_TYXC.permute(0, 3, 1, 2)
    if recipe.resize is not None:
        assert recipe.resize_px is not None
        size = [recipe.resize_px[0]] if recipe.resize == "shortest" else list(recipe.resize_px)
        # Pillow's nearest neighbour is torchvision's `nearest-exact`.
        name = "nearest-exact" if recipe.interpolation == "nearest" else recipe.interpolation
        mode = InterpolationMode(name)
        frames_TCYX = F.resize(frames_TCYX, size, interpolation=mode, antialias=recipe.antialias)
    if recipe.crop_px is not None:
        height, width = frames_TCYX.shape[2:]
        side = recipe.crop_px
        if side > min(height, width):
            raise ValueError(f"the recipe crops {side} x {side} from frames of {height} x {width}")
        margins = (height - side) / 2, (width - side) / 2
        # round() takes a half to the even neighbour.
        top, left = (round(margin) if recipe.middle == "even" else int(margin) for margin in margins)
        frames_TCYX = frames_TCYX[:, :, top : top + side, left : left + side]
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.rgb_mean, spec.rgb_std))
    return (frames_TCYX / 255 - mean) / std
